"""Online DPO on the embedded world's film reviews, against the reward model.

Command: python -m experiments.online_dpo --workdir=runs/online_dpo --init_from=runs/sft --reward_from=runs/reward_model
"""

from experiments.configs import quickstart
from experiments.launch import to_config_dict
from rlhf_jax.stages import config as configs
from rlhf_jax.stages import online_dpo
from rlhf_jax.stages.inputs import DataConfig
from rlhf_jax.stages.preference_objectives import PreferenceLoss
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config():
    data = configs.from_dict(DataConfig, quickstart.get_config().data.to_dict())
    return to_config_dict(
        online_dpo.Config(
            data=data,
            optimizer=OptimizerConfig(learning_rate=3e-4, schedule="constant", b2=0.99),
            schedule=Schedule(num_steps=100, eval_every=10, save_every=50),
            batch_size=256,
            loss=PreferenceLoss(beta=0.1),
        )
    )
