"""What experiments.methods runs beside the quickstart's PPO and DPO, each against the same reward model.

Command: python -m experiments.methods --quickstart=runs/quickstart --workdir=runs/methods
Time: 3 to 5 minutes on two cores shared with other work. Expect, at seed 0, gold (KL): RLOO 4.0 (2.9), GRPO 3.0 (1.7),
online DPO 3.2 (1.8), iterative DPO 3.1 (6.8), rejection sampling 1.3 (1.6); SFT 1.05, PPO 4.2 (4.2).
"""

import ml_collections

from experiments.configs import quickstart
from experiments.ladder import own_fields
from rlhf_jax.stages import evaluate, grpo, online_dpo, rejection
from rlhf_jax.stages.preference_objectives import PreferenceLoss
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config():
    base = quickstart.get_config()
    config = ml_collections.ConfigDict({"seed": base.seed})
    config.data = base.data
    steady = OptimizerConfig(learning_rate=3e-4, schedule="constant", b2=0.99)
    grouped = {"optimizer": steady, "batch_size": 256, "group_size": 8, "num_epochs": 2, "num_minibatches": 2}
    grouped |= {"schedule": Schedule(num_steps=60, eval_every=10, save_every=30)}
    config.grpo = own_fields(grpo.Config(**grouped, beta=0.3))
    config.rloo = own_fields(
        grpo.Config(
            **grouped,
            beta=0.3,
            kl_in="reward",
            baseline="leave_one_out",
            scale_advantages=False,
            reduction="sequence_mean_of_token_sums",
        )
    )
    config.online_dpo = own_fields(
        online_dpo.Config(
            optimizer=steady,
            schedule=Schedule(num_steps=60, eval_every=10, save_every=30),
            batch_size=256,
            loss=PreferenceLoss(beta=1.0),
        )
    )
    config.iterative_dpo = own_fields(
        online_dpo.Config(
            optimizer=steady,
            schedule=Schedule(num_steps=3, eval_every=1, save_every=1),
            batch_size=4096,
            num_minibatches=32,
            loss=PreferenceLoss(beta=1.0),
            reference="iteration",
        )
    )
    config.rft = own_fields(
        rejection.Config(
            optimizer=steady,
            schedule=Schedule(num_steps=10, eval_every=2, save_every=10),
            batch_size=512,
            group_size=8,
        )
    )
    config.evaluate = own_fields(evaluate.Config())
    return config
