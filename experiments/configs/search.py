"""Best-of-n and a step beam on the embedded arithmetic.

Command: python -m experiments.search --workdir=runs/arithmetic/search --policy_from=runs/arithmetic/sft \
    --reward_from=runs/arithmetic/process
"""

from experiments.configs import arithmetic_sft
from experiments.launch import to_config_dict
from rlhf_jax.stages import search


def get_config():
    return to_config_dict(search.Config(data=arithmetic_sft.DATA))
