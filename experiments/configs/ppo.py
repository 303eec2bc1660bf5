"""TODO"""

from experiments.launch import to_config_dict
from rlhf_jax.stages import ppo


def get_config():
    return to_config_dict(ppo.Config())
