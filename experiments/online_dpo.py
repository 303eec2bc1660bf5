"""Online and iterative DPO: sample, label the best and the worst of a group by a reward, take DPO's step.

    python -m experiments.online_dpo --workdir=runs/online_dpo --init_from=runs/sft --reward_from=runs/reward_model

Iterative: many prompts an iteration, many updates, and the policy that sampled as the reference of the next ones:

    python -m experiments.online_dpo --workdir=runs/iterative_dpo --init_from=runs/sft \\
        --reward_from=runs/reward_model --config.batch_size=4096 --config.num_minibatches=32 \\
        --config.schedule.num_steps=4 --config.reference=iteration
"""

from experiments import launch
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages import config as configs
from rlhf_jax.stages import online_dpo

CONFIG = launch.define_config("online_dpo")
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
    config = configs.from_dict(online_dpo.Config, CONFIG.value.to_dict())
    online_dpo.run(
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
    launch.launch(main, online_dpo.Config)
