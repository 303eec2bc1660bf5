"""TODO"""

from experiments.launch import to_config_dict
from rlhf_jax.stages import reward_model


def get_config():
    return to_config_dict(reward_model.Config())
