"""A process reward model from solutions whose steps are judged, and GRPO against it.

    python -m experiments.process_reward --workdir=runs/arithmetic/process_plain --init_from=runs/arithmetic/sft \\
        --config.data.arithmetic.spoiled_rate=0.0
    python -m experiments.process_reward --workdir=runs/arithmetic/process --init_from=runs/arithmetic/process_plain \\
        --config.schedule.num_steps=1500 --config.optimizer.learning_rate=0.003
    python -m experiments.grpo --config=experiments/configs/arithmetic.py --workdir=runs/arithmetic/grpo_steps \\
        --init_from=runs/arithmetic/sft --reward_from=runs/arithmetic/process \\
        --config.reward=process --config.credit=step --config.answer_weight=1.0

Files in the formats of PRM800K, Math-Shepherd and TRL: --config.data.path=<file> --config.step_mark=$'\\n'
"""

from experiments import launch
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages import config as configs
from rlhf_jax.stages import process_reward

CONFIG = launch.define_config("process_reward")
WORKDIR = launch.define_workdir()
INIT_FROM = launch.define_init_from(
    "Run directory of SFT, or a Hugging Face directory: the trunk to start from."
)
PARALLELISM = launch.define_parallelism()
MESH = launch.define_mesh()
launch.define_distributed()


def main(stop):
    config = configs.from_dict(process_reward.Config, CONFIG.value.to_dict())
    process_reward.run(
        config,
        WORKDIR.value,
        init_from=INIT_FROM.value,
        parallelism=PARALLELISM.value,
        mesh=meshes.make_mesh(MESH.value),
        stop=stop,
    )
    launch.print_report(WORKDIR.value)


if __name__ == "__main__":
    launch.launch(main, process_reward.Config)
