"""The ladder on the embedded world: film reviews, a labeller who likes length, a gold reward that does not.

Command: make quickstart (python -m experiments.quickstart --workdir=runs/quickstart)
"""

import ml_collections

from experiments.ladder import own_fields
from experiments.launch import to_config_dict
from rlhf_jax.data.world import WorldConfig
from rlhf_jax.stages import dpo, evaluate, ppo, reward_model, sft
from rlhf_jax.stages.inputs import DataConfig
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config():
    world = WorldConfig(length_bias=0.3, num_demonstrations=16384, num_preferences=32768)
    leashed = ppo.Config(
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant"),
        schedule=Schedule(num_steps=80, eval_every=5, save_every=20),
        beta=0.15,
    )
    config = ml_collections.ConfigDict({"seed": 0})
    config.model = to_config_dict(sft.ModelSource())
    config.data = to_config_dict(DataConfig(world=world))
    config.sft = own_fields(
        sft.Config(
            optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=20),
            schedule=Schedule(num_steps=500, eval_every=100, save_every=250),
        )
    )
    config.reward_model = own_fields(
        reward_model.Config(
            optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=20),
            schedule=Schedule(num_steps=500, eval_every=100, save_every=250),
        )
    )
    config.ppo = own_fields(leashed)
    config.ppo_no_leash = own_fields(
        ppo.Config(
            optimizer=leashed.optimizer,
            schedule=Schedule(num_steps=120, eval_every=5, save_every=20),
            beta=0.0,
        )
    )
    config.dpo = own_fields(
        dpo.Config(
            optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=20),
            schedule=Schedule(num_steps=200, eval_every=100, save_every=200),
            beta=0.3,
        )
    )
    config.evaluate = own_fields(evaluate.Config())
    return config
