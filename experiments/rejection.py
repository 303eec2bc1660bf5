"""Learning from one's own samples, the better ones: rejection-sampling fine-tuning, AWR, RWR, GDC.

    python -m experiments.rejection --workdir=runs/rft --init_from=runs/sft --reward_from=runs/reward_model
    python -m experiments.rejection --workdir=runs/gdc --init_from=runs/sft --reward_from=runs/reward_model \\
        --config.kind=distribution
"""

from experiments import launch
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages import config as configs
from rlhf_jax.stages import rejection

CONFIG = launch.define_config("rejection")
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
    config = configs.from_dict(rejection.Config, CONFIG.value.to_dict())
    rejection.run(
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
    launch.launch(main, rejection.Config)
