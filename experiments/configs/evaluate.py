"""The quickstart's evaluate stage by itself; time and expected numbers are those of quickstart.py.

Command: python -m experiments.evaluate --workdir=runs/evaluate --init_from=runs/sft --reward_from=runs/reward_model
"""

from experiments import ladder
from experiments.configs import quickstart
from experiments.launch import to_config_dict


def get_config():
    return to_config_dict(ladder.stage_configs(quickstart.get_config().to_dict())["evaluate"])
