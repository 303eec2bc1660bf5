"""GRPO on the embedded world's film reviews, against the reward model.

Command: python -m experiments.grpo --workdir=runs/grpo --init_from=runs/sft --reward_from=runs/reward_model
"""

from experiments.configs import quickstart
from experiments.launch import to_config_dict
from rlhf_jax.stages import config as configs
from rlhf_jax.stages import grpo
from rlhf_jax.stages.inputs import DataConfig
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config():
    data = configs.from_dict(DataConfig, quickstart.get_config().data.to_dict())
    return to_config_dict(
        grpo.Config(
            data=data,
            optimizer=OptimizerConfig(learning_rate=3e-4, schedule="constant", b2=0.99),
            schedule=Schedule(num_steps=100, eval_every=10, save_every=50),
            batch_size=256,
            num_epochs=2,
            num_minibatches=2,
            beta=0.3,
            kl_in="reward",
        )
    )
