"""GRPO and its relatives: policy gradients with a group of responses to a prompt as baseline, and no value model.

Against a verifier, on the embedded arithmetic (first a policy that works sums out and often slips):

    python -m experiments.sft  --config=experiments/configs/arithmetic_sft.py --workdir=runs/arithmetic/sft
    python -m experiments.grpo --config=experiments/configs/arithmetic.py --workdir=runs/arithmetic/grpo \\
        --init_from=runs/arithmetic/sft

Against a reward model, on the embedded film reviews:

    python -m experiments.grpo --workdir=runs/grpo --init_from=runs/sft --reward_from=runs/reward_model
"""

from experiments import launch
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages import config as configs
from rlhf_jax.stages import grpo

CONFIG = launch.define_config("grpo")
WORKDIR = launch.define_workdir()
INIT_FROM = launch.define_init_from(
    "Run directory of SFT, or a Hugging Face directory: the initial policy and the frozen reference."
)
REWARD_FROM = launch.define_reward_from()
HELD_OUT_REWARD_FROM = launch.define_held_out_reward_from()
JUDGE_FROM = launch.define_judge_from()
PARALLELISM = launch.define_parallelism()
MESH = launch.define_mesh()
launch.define_distributed()


def main(stop):
    config = configs.from_dict(grpo.Config, CONFIG.value.to_dict())
    grpo.run(
        config,
        WORKDIR.value,
        init_from=INIT_FROM.value,
        reward_from=REWARD_FROM.value,
        held_out_reward_from=HELD_OUT_REWARD_FROM.value,
        judge_from=JUDGE_FROM.value,
        parallelism=PARALLELISM.value,
        mesh=meshes.make_mesh(MESH.value),
        stop=stop,
    )
    launch.print_report(WORKDIR.value)


if __name__ == "__main__":
    launch.launch(main, grpo.Config)
