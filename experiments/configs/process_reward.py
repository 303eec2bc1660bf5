"""A process reward model on the embedded arithmetic, whose steps have known labels.

Command: python -m experiments.process_reward --workdir=runs/arithmetic/process --init_from=runs/arithmetic/sft
"""

import dataclasses

from experiments.configs import arithmetic_sft
from experiments.launch import to_config_dict
from rlhf_jax.data import arithmetic
from rlhf_jax.stages import process_reward
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config():
    return to_config_dict(
        process_reward.Config(
            data=dataclasses.replace(arithmetic_sft.DATA, truncation="keep_start"),
            step_mark=arithmetic.STEP_MARK,
            optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50, b2=0.99),
            schedule=Schedule(num_steps=4000, eval_every=500, save_every=1000),
        )
    )
