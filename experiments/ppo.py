"""PPO against a reward, on a per-token KL leash to the SFT policy.

    python -m experiments.ppo --workdir=runs/ppo --init_from=runs/sft --reward_from=runs/reward_model

Without the leash:

    python -m experiments.ppo --workdir=runs/ppo_no_leash --init_from=runs/sft --reward_from=runs/reward_model \\
        --config.beta=0.0

Against a process reward model, paid as steps end: --config.reward=process --config.credit=step; without any model:
--config.reward=answer or sentiment.
"""

from experiments import launch
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages import config as configs
from rlhf_jax.stages import ppo

CONFIG = launch.define_config("ppo")
WORKDIR = launch.define_workdir()
INIT_FROM = launch.define_init_from(
    "Run directory of SFT, or a Hugging Face directory: the initial policy and the frozen reference."
)
REWARD_FROM = launch.define_reward_from()
HELD_OUT_REWARD_FROM = launch.define_held_out_reward_from()
PARALLELISM = launch.define_parallelism()
MESH = launch.define_mesh()
launch.define_distributed()


def main(stop):
    config = configs.from_dict(ppo.Config, CONFIG.value.to_dict())
    ppo.run(
        config,
        WORKDIR.value,
        init_from=INIT_FROM.value,
        reward_from=REWARD_FROM.value,
        held_out_reward_from=HELD_OUT_REWARD_FROM.value,
        parallelism=PARALLELISM.value,
        mesh=meshes.make_mesh(MESH.value),
        stop=stop,
    )
    launch.print_report(WORKDIR.value)


if __name__ == "__main__":
    launch.launch(main, ppo.Config)
