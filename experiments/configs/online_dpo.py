"""Online DPO on the embedded world's film reviews, as in methods.py, whose docstring says what to expect.

Command: python -m experiments.online_dpo --workdir=runs/online_dpo --init_from=runs/sft --reward_from=runs/reward_model
"""

from experiments.configs import methods
from experiments.launch import to_config_dict
from rlhf_jax.stages import config as configs
from rlhf_jax.stages import online_dpo


def get_config():
    base = methods.get_config().to_dict()
    fields = {**base["online_dpo"], "seed": base["seed"], "data": base["data"]}
    return to_config_dict(configs.from_dict(online_dpo.Config, fields))
