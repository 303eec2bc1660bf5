"""The ladder on the embedded world: film reviews, a labeller who likes length, a gold reward that does not.

Command: make quickstart (python -m experiments.quickstart --workdir=runs/quickstart)
Time: 309 s on two cores, 1.4 GB.
Expect, at seed 0: reward model 0.791 of at most 0.804; gold of SFT 1.05, PPO 4.1 at 5.2 nats, DPO 3.2, best of 16 3.7;
without the leash gold goes from 1.3 over 3.8 to 0.5 while the proxy goes from -0.6 over 2.5 to 3.6.
"""

import ml_collections

from experiments.ladder import own_fields
from experiments.launch import to_config_dict
from rlhf_jax.data.world import WorldConfig
from rlhf_jax.stages import dpo, evaluate, ppo, reward_model, sft
from rlhf_jax.stages.inputs import DataConfig
from rlhf_jax.stages.preference_objectives import PreferenceLoss
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config():
    world = WorldConfig(
        length_bias=0.1,
        num_demonstrations=32768,
        num_preferences=49152,
        num_eval_preferences=8192,
        num_eval_prompts=512,
    )
    config = ml_collections.ConfigDict({"seed": 0})
    config.model = to_config_dict(sft.ModelSource())
    config.data = to_config_dict(DataConfig(world=world))
    config.sft = own_fields(
        sft.Config(
            optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50, b2=0.99),
            schedule=Schedule(num_steps=400, eval_every=100, save_every=200),
        )
    )
    config.reward_model = own_fields(
        reward_model.Config(
            optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50, b2=0.99),
            schedule=Schedule(num_steps=1000, eval_every=500, save_every=500),
        )
    )
    config.dpo = own_fields(
        dpo.Config(
            optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=20, b2=0.99),
            schedule=Schedule(num_steps=200, eval_every=50, save_every=100),
            loss=PreferenceLoss(beta=0.1),
        )
    )
    config.ppo = own_fields(leashed(num_steps=50, eval_every=5, beta=0.3))
    config.ppo_no_leash = own_fields(leashed(num_steps=60, eval_every=2, beta=0.0))
    config.evaluate = own_fields(evaluate.Config())
    return config


def leashed(*, num_steps: int, eval_every: int, beta: float) -> ppo.Config:
    """PPO on a leash of strength ``beta``; both runs differ in nothing else but their length."""
    return ppo.Config(
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant", b2=0.99),
        schedule=Schedule(num_steps=num_steps, eval_every=eval_every, save_every=20),
        num_epochs=4,
        num_minibatches=2,
        beta=beta,
        lam=1.0,
        value_clip=5.0,
        value_coefficient=0.5,
    )
