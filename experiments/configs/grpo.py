"""GRPO on the embedded world's film reviews, as in methods.py, whose docstring says what to expect.

Command: python -m experiments.grpo --workdir=runs/grpo --init_from=runs/sft --reward_from=runs/reward_model
"""

from experiments.configs import methods
from experiments.launch import to_config_dict
from rlhf_jax.stages import config as configs
from rlhf_jax.stages import grpo


def get_config():
    base = methods.get_config().to_dict()
    fields = {**base["grpo"], "seed": base["seed"], "data": base["data"]}
    return to_config_dict(configs.from_dict(grpo.Config, fields))
