"""Rejection-sampling fine-tuning on the embedded film reviews, as in methods.py, which says what to expect.

Command: python -m experiments.rejection --workdir=runs/rejection --init_from=runs/sft --reward_from=runs/reward_model
"""

from experiments.configs import methods
from experiments.launch import to_config_dict
from rlhf_jax.stages import config as configs
from rlhf_jax.stages import rejection


def get_config():
    base = methods.get_config().to_dict()
    fields = {**base["rft"], "seed": base["seed"], "data": base["data"]}
    return to_config_dict(configs.from_dict(rejection.Config, fields))
