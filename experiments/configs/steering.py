"""A model of children's stories steered towards a happy tone, on a leash.

Command: python -m experiments.steering --init_from=<Hugging Face directory of stories260K> --workdir=runs/steering
"""

import ml_collections

from experiments.ladder import own_fields
from experiments.launch import to_config_dict
from rlhf_jax.stages import dpo, grpo, online_dpo, ppo, steering
from rlhf_jax.stages.inputs import DataConfig
from rlhf_jax.stages.preference_objectives import PreferenceLoss
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig

DPO_STEPS = {"dpo_10": 10, "dpo_25": 25, "dpo_70": 70}


def get_config():
    config = ml_collections.ConfigDict({"seed": 0})
    config.data = to_config_dict(DataConfig(prompt_length=48, response_length=48, held_out_fraction=0.2))
    optimizer = OptimizerConfig(learning_rate=3e-4, schedule="constant", b2=0.99)
    schedule = Schedule(num_steps=30, eval_every=5, save_every=30)
    shared = {
        "optimizer": optimizer,
        "schedule": schedule,
        "batch_size": 64,
        "reward": "sentiment",
        "num_eval_prompts": 16,
        "eval_responses_per_prompt": 4,
    }
    config.ppo = own_fields(
        ppo.Config(
            **shared,
            beta=0.2,
            num_epochs=2,
            num_minibatches=2,
            lam=1.0,
            value_clip=5.0,
            value_coefficient=0.5,
        )
    )
    config.grpo = own_fields(grpo.Config(**shared, beta=0.1, group_size=8, num_epochs=2, num_minibatches=2))
    config.online_dpo = own_fields(online_dpo.Config(**shared, group_size=4, loss=PreferenceLoss(beta=0.3)))
    config.pairs = own_fields(steering.PairsConfig(responses_per_prompt=64))
    # Each length of training is a point on the picture: offline DPO samples nothing on its way.
    for name, steps in DPO_STEPS.items():
        config[name] = own_fields(
            dpo.Config(
                optimizer=optimizer,
                schedule=Schedule(num_steps=steps, save_every=steps),
                batch_size=32,
                loss=PreferenceLoss(beta=0.3),
            )
        )
    config.measure = own_fields(steering.Config())
    return config
