"""The over-optimisation lab: proxies of several amounts of data, and an ensemble, each pushed too far.

Command: python -m experiments.overoptimization --quickstart=runs/quickstart --workdir=runs/overoptimization
"""

import ml_collections

from experiments.configs import quickstart
from experiments.ladder import own_fields
from rlhf_jax.stages import best_of_n, reward_model
from rlhf_jax.stages.rollouts import Scoring
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config():
    base = quickstart.get_config()
    config = ml_collections.ConfigDict({"seed": base.seed, "data": base.data})
    # Name -> its pairs and how it is trained; with several members it is an ensemble.
    config.num_preferences = ml_collections.ConfigDict(
        {"pairs_1k": 1024, "pairs_8k": 8192, "ensemble_8k": 8192}
    )
    config.proxies = ml_collections.ConfigDict()
    config.proxies.pairs_1k = own_fields(proxy(num_steps=100))
    config.proxies.pairs_8k = own_fields(proxy(num_steps=300))
    config.proxies.ensemble_8k = own_fields(proxy(num_steps=300, members=4))
    scoring = Scoring(members="mean_minus_variance", penalty=0.5)
    config.best_of_n = own_fields(best_of_n.Config(scoring=scoring))
    ppo = quickstart.leashed(num_steps=30, eval_every=2, beta=0.0)
    config.ppo = own_fields(ppo)
    config.ppo.scoring = config.best_of_n.scoring
    return config


def proxy(*, num_steps: int, members: int = 1) -> reward_model.Config:
    return reward_model.Config(
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20, b2=0.99),
        schedule=Schedule(num_steps=num_steps, save_every=num_steps),
        members=members,
    )
