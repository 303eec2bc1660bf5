"""The over-optimisation lab: proxies of several sizes and amounts of data, and an ensemble, each pushed too far.

Command: python -m experiments.overoptimization --quickstart=runs/quickstart --workdir=runs/overoptimization
"""

import ml_collections

from experiments.configs import quickstart
from experiments.ladder import own_fields
from experiments.launch import to_config_dict
from rlhf_jax.stages import best_of_n, reward_model, sft
from rlhf_jax.stages.rewards import Scoring
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig


def get_config():
    base = quickstart.get_config()
    config = ml_collections.ConfigDict({"seed": base.seed, "data": base.data})
    # A trunk for a small proxy: SFT of another size than the policy.
    config.narrow = own_fields(
        sft.Config(
            optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50, b2=0.99),
            schedule=Schedule(num_steps=400, save_every=400),
        )
    )
    config.narrow.model = to_config_dict(
        sft.ModelSource(width=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=44)
    )
    # SFT once more, from other weights and in another order, for members of an ensemble with trunks of their own.
    config.trunk = base.sft
    config.trunk.model = base.model
    # Name -> how many pairs it sees, whether it starts from the narrow trunk, how it is trained; with several members
    # it is an ensemble, of as many trunks as it says.
    config.proxies = ml_collections.ConfigDict(
        {
            "pairs_1k": proxy(pairs=1024, num_steps=100),
            "pairs_8k": proxy(pairs=8192, num_steps=300),
            "narrow_8k": proxy(pairs=8192, num_steps=300, narrow=True),
            "ensemble_8k": proxy(pairs=8192, num_steps=300, members=4),
            "trunks_8k": proxy(pairs=8192, num_steps=300, members=4, trunks=4),
        }
    )
    config.best_of_n = own_fields(best_of_n.Config())
    config.ppo = own_fields(quickstart.leashed(num_steps=30, eval_every=2, beta=0.0))
    # Name -> what differs from config.ppo: which proxy, how an ensemble's members become one number, the leash.
    config.policies = ml_collections.ConfigDict(
        {
            "pairs_1k": policy("pairs_1k"),
            "pairs_8k": policy("pairs_8k"),
            "narrow_8k": policy("narrow_8k"),
            "mean": policy("ensemble_8k"),
            "worst_case": policy("ensemble_8k", members="worst_case"),
            "mean_minus_variance": policy("ensemble_8k", members="mean_minus_variance"),
            "trunks_mean": policy("trunks_8k"),
            "trunks_worst_case": policy("trunks_8k", members="worst_case"),
            "trunks_mean_minus_variance": policy("trunks_8k", members="mean_minus_variance"),
            "weak_leash": policy("pairs_8k", beta=0.1),
            "strong_leash": policy("pairs_8k", beta=0.3),
        }
    )
    return config


def proxy(*, pairs, num_steps, narrow=False, members=1, trunks=1):
    trained = reward_model.Config(
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20, b2=0.99),
        schedule=Schedule(num_steps=num_steps, save_every=num_steps),
        members=members,
    )
    return {"pairs": pairs, "narrow": narrow, "trunks": trunks, "reward_model": own_fields(trained)}


def policy(name, *, members="mean", beta=0.0):
    return {"proxy": name, "beta": beta, "scoring": to_config_dict(Scoring(members=members))}
