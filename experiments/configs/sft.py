"""SFT on the embedded world.

Command: python -m experiments.sft --workdir=runs/sft
"""

from experiments.launch import to_config_dict
from rlhf_jax.stages import sft


def get_config():
    return to_config_dict(sft.Config())
