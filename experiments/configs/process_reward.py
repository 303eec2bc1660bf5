"""A process reward model on the embedded arithmetic, whose steps have known labels.

Commands: python -m experiments.process_reward --workdir=runs/arithmetic/process_plain --init_from=runs/arithmetic/sft \
    --config.data.arithmetic.spoiled_rate=0.0
python -m experiments.process_reward --workdir=runs/arithmetic/process --init_from=runs/arithmetic/process_plain \
    --config.schedule.num_steps=1500 --config.optimizer.learning_rate=0.003

The first learns to add from the demonstrator's own slips, the second what else can be wrong with an answer. Both at
once, 3,500 steps, ended at an accuracy of 0.69 where always "right" has 0.60.
Expect: 0.93 after the first, on answers that are not spoiled (always "right": 0.77); 0.88 after the second (0.60).
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
            schedule=Schedule(num_steps=3000, eval_every=500, save_every=1000),
        )
    )
