"""The ladder on human preferences between arguments: a small pretrained model, unseen topics held out, no gold reward.

Command: python -m experiments.quickstart --workdir=runs/arguments --config=experiments/configs/arguments.py
    --config.model.path=<Hugging Face directory> --config.data.path=<ukp_convarg1_strict_pairs.jsonl.gz>

Sized for a model of 260 thousand parameters and 512 tokens (stories260K): 11 minutes on two cores shared with other
work. Expect with it: reward model 0.662 on 881 pairs of four unseen topics, where "the longer one wins" reaches 0.712;
proxy -0.65 (SFT), -0.19 (PPO, KL 30), 0.47 (PPO without leash, KL 74), -0.81 (DPO, KL 18), 1.79 (best of 16).
docs/real_input.md says why, and what the policies learned to exploit.

A pair with a response of more than 128 tokens is dropped (8,835 of 11,642 pairs with this tokenizer; data.json lists
them). Steps are few because each text is in many pairs: more of them memorise the texts.
"""

import ml_collections

from experiments.ladder import own_fields
from experiments.launch import to_config_dict
from rlhf_jax.stages import dpo, evaluate, ppo, reward_model, sft
from rlhf_jax.stages.inputs import DataConfig
from rlhf_jax.stages.preference_objectives import PreferenceLoss
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config():
    config = ml_collections.ConfigDict({"seed": 0})
    config.model = to_config_dict(sft.ModelSource())
    config.data = to_config_dict(
        DataConfig(prompt_length=104, response_length=128, truncation="drop", held_out_fraction=0.2)
    )
    config.sft = own_fields(
        sft.Config(
            optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20, b2=0.99),
            schedule=Schedule(num_steps=60, eval_every=30, save_every=60),
            batch_size=32,
        )
    )
    config.reward_model = own_fields(
        reward_model.Config(
            optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=5, b2=0.99),
            schedule=Schedule(num_steps=30, eval_every=10, save_every=30),
            batch_size=32,
        )
    )
    config.dpo = own_fields(
        dpo.Config(
            optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=20, b2=0.99),
            schedule=Schedule(num_steps=30, eval_every=0, save_every=30),
            batch_size=32,
            loss=PreferenceLoss(beta=0.1),
        )
    )
    config.ppo = own_fields(leashed(beta=0.1))
    config.ppo_no_leash = own_fields(leashed(beta=0.0))
    config.evaluate = own_fields(evaluate.Config(responses_per_prompt=16, batch_size=128))
    return config


def leashed(*, beta: float) -> ppo.Config:
    """PPO on a leash of strength ``beta``; both runs differ in nothing else."""
    return ppo.Config(
        optimizer=OptimizerConfig(learning_rate=5e-4, schedule="constant", b2=0.99),
        schedule=Schedule(num_steps=16, eval_every=4, save_every=8),
        batch_size=64,
        num_epochs=2,
        num_minibatches=2,
        beta=beta,
        lam=1.0,
        value_clip=5.0,
        value_coefficient=0.5,
        eval_responses_per_prompt=8,
    )
