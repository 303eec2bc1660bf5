"""What the over-optimisation lab trains, and what it draws of what came out. Imports stages and evaluation.

`experiments.overoptimization` is the command.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.evaluation import best_of_n as estimators
from rlhf_jax.evaluation.overoptimization_page import Measured, Section
from rlhf_jax.evaluation.policies import best_of_n_kl
from rlhf_jax.metrics import read_metrics
from rlhf_jax.rewards import ensembles
from rlhf_jax.stages import config as configs
from rlhf_jax.stages import reward_model, sft

# Sets of prompts whose curves are independent, for the intervals of best-of-n.
NUM_SETS = 16
BEST_OF_N_KLS = (0.5, 1.0, 2.0, 4.0, 5.9)
RL_KLS = (2.0, 5.0, 10.0, 20.0, 40.0)
# What the sections are made of.
DRAWN = {
    "proxies": ("pairs_1k", "pairs_8k", "narrow_8k", "ensemble_8k", "trunks_8k"),
    "policies": (
        "pairs_1k",
        "pairs_8k",
        "narrow_8k",
        "mean",
        "worst_case",
        "mean_minus_variance",
        "trunks_mean",
        "trunks_worst_case",
        "trunks_mean_minus_variance",
        "weak_leash",
        "strong_leash",
    ),
}
# Seeds of further trunks lie so far apart that no other lab's first one is among them.
_OTHER_SEEDS = 1000
# The quickstart's reward model saw that many pairs.
FULL = "pairs_49k"


def train_proxies(
    config: Mapping[str, Any], workdir: pathlib.Path, start: pathlib.Path, how: Mapping[str, Any]
) -> dict[str, pathlib.Path]:
    """Every proxy of the config, trained; name -> its run.

    Raises:
      InputError: trunks that a proxy could not start from, before any training; or what a stage refuses.
    """
    for name, made in config["proxies"].items():
        members = made["reward_model"]["members"]
        if made["trunks"] not in ((1,) if made["narrow"] else (1, members)):
            raise InputError(
                f"config.proxies.{name}.trunks is {made['trunks']}, with {members} members and narrow={made['narrow']}"
                "; give 1, or for an ensemble of the usual width one for each member"
            )
    narrow = workdir / "sft_narrow"
    if any(made["narrow"] for made in config["proxies"].values()):
        sft.run(built(sft.Config, config, config["narrow"], "config.narrow"), narrow, **how)
    found = {}
    most = max(made["trunks"] for made in config["proxies"].values())
    trunks = [start / "sft", *(workdir / f"sft_{number}" for number in range(1, most))]
    for number, trunk in enumerate(trunks[1:], 1):
        again = {**config, "seed": config["seed"] + _OTHER_SEEDS * number}
        sft.run(built(sft.Config, again, config["trunk"], "config.trunk"), trunk, **how)
    for name, made in config["proxies"].items():
        found[name] = workdir / f"reward_{name}"
        trained = built(
            reward_model.Config, config, made["reward_model"], f"config.proxies.{name}", pairs=made["pairs"]
        )
        origins = [narrow] if made["narrow"] else trunks[: made["trunks"]]
        reward_model.run(trained, found[name], init_from=",".join(map(str, origins)), **how)
    return found


def built(
    cls: type, config: Mapping[str, Any], fields: Mapping[str, Any], where: str, pairs: int | None = None
) -> Any:
    """A stage's config from its part of the lab's; of a proxy, with as many pairs as it may see."""
    data = config["data"]
    if pairs is not None:
        data = {**data, "world": {**data["world"], "num_preferences": pairs}}
    return configs.from_dict(cls, {**fields, "seed": config["seed"], "data": data}, where)


def sections_of_best_of_n(scores: Mapping[str, np.ndarray], *, penalty: float) -> list[Section]:
    """By amount of data, up to the labellers' own taste; by size; and of one model or four."""
    gold = scores["gold"]
    joined = _joined(scores["ensemble_8k"], penalty)
    apart = {f"trunks_{name}": values for name, values in _joined(scores["trunks_8k"], penalty).items()}
    of = {
        name: of_best_of_n(scores[name], gold)
        for name in ("labeller", FULL, "pairs_8k", "pairs_1k", "narrow_8k")
    }
    of |= {
        name: of_best_of_n(np.asarray(values).reshape(gold.shape), gold)
        for name, values in (joined | apart).items()
    }
    section = functools.partial(Section, kls=BEST_OF_N_KLS)
    return [
        section(
            key="best_of_n_data",
            title="Best-of-n by amount of data",
            courses=pick(of, "labeller", FULL, "pairs_8k", "pairs_1k"),
        ),
        section(
            key="best_of_n_size",
            title="Best-of-n by size of the proxy",
            courses=pick(of, "pairs_8k", "narrow_8k"),
        ),
        section(
            key="best_of_n_ensemble",
            title="Best-of-n by one reward model and by four",
            courses=pick(of, "pairs_8k", *joined),
        ),
        section(
            key="best_of_n_trunks",
            title="Best-of-n by one reward model and by four from trunks of their own",
            courses=pick(of, "pairs_8k", *apart),
        ),
    ]


def _joined(members: np.ndarray, penalty: float) -> dict[str, Any]:
    """The scores [P N] of an ensemble [E, P, N] in each of the ways to make one number of them."""
    flat = members.reshape(len(members), -1)
    return {
        "mean": ensembles.mean_score(flat),
        "worst_case": ensembles.worst_case_score(flat),
        "mean_minus_variance": ensembles.mean_minus_variance(flat, penalty=penalty),
    }


def sections_of_runs(runs: Mapping[str, pathlib.Path]) -> list[Section]:
    """PPO by proxy, by one model or four, and by leash."""
    of = {name: of_run(path) for name, path in runs.items()}
    section = functools.partial(Section, kls=RL_KLS)
    return [
        section(
            key="ppo_data",
            title="PPO without a leash, by proxy",
            courses={FULL: of["no_leash"], **pick(of, "pairs_8k", "pairs_1k", "narrow_8k")},
        ),
        section(
            key="ppo_ensemble",
            title="PPO without a leash, by one reward model and by four",
            courses=pick(of, "pairs_8k", "mean", "worst_case", "mean_minus_variance"),
        ),
        section(
            key="ppo_trunks",
            title="PPO without a leash, by one reward model and by four from trunks of their own",
            courses=pick(of, "pairs_8k", "trunks_mean", "trunks_worst_case", "trunks_mean_minus_variance"),
        ),
        section(
            key="ppo_leash",
            title="PPO with and without a leash",
            courses={
                "pairs_8k": of["pairs_8k"],
                "pairs_8k, beta 0.1": dataclasses.replace(of["weak_leash"], fits=None),
                "pairs_8k, beta 0.3": dataclasses.replace(of["strong_leash"], fits=None),
                f"{FULL}, beta 0.3": dataclasses.replace(of["leash"], fits=None),
            },
        ),
    ]


def pick(courses: Mapping[str, Measured], *names: str) -> dict[str, Measured]:
    return {name: courses[name] for name in names}


def powers_of_two(most: int) -> list[int]:
    """2, 4, 8, ... up to ``most``."""
    return [2**k for k in range(1, int(math.log2(most)) + 1)]


def of_best_of_n(proxy: np.ndarray, gold: np.ndarray) -> Measured:
    """Gains of best-of-n at powers of two from 2 to N, of `NUM_SETS` sets of prompts; arrays are [P, N]."""
    ns = powers_of_two(proxy.shape[1])
    found = estimators.measurements(proxy, gold, ns, num_sets=min(NUM_SETS, len(proxy)))
    return Measured(
        distance=found.distance, proxy=found.proxy, gold=found.gold, clusters=found.clusters, fits="best_of_n"
    )


def kl_of_best_of_n(proxy: np.ndarray, log_prob: np.ndarray) -> list[dict[str, float]]:
    """The KL of best-of-n beside log n - (n-1)/n, with the standard error over prompts, up to n = N / 8."""
    rows = []
    for n in powers_of_two(proxy.shape[1] // 8):
        found = estimators.sampled_kl(proxy, log_prob, n)
        error = float(found.std(ddof=1) / math.sqrt(len(found)))
        rows.append({"n": n, "bound": best_of_n_kl(n), "measured": float(found.mean()), "error": error})
    return rows


def print_kl(rows: list[dict[str, float]]) -> None:
    print("KL of best-of-n, nats:\n" + f"{'n':>6}{'log n - (n-1)/n':>18}{'measured':>10}{'error':>8}")
    for row in rows:
        print(f"{row['n']:>6}{row['bound']:18.3f}{row['measured']:10.3f}{row['error']:8.3f}")


def of_run(path: pathlib.Path) -> Measured:
    """Gains of a run at its evaluations over what it started from."""
    rows = [row for row in read_metrics(path / "metrics.jsonl") if "eval/gold" in row]
    if len(rows) < 2:
        raise InputError(
            f"{path} has {len(rows)} evaluations with a gold reward; give a finished quickstart, or set "
            "config.ppo.schedule.eval_every"
        )
    values = {name: np.array([row[f"eval/{name}"] for row in rows]) for name in ("kl", "proxy", "gold")}
    return Measured(
        distance=np.sqrt(np.maximum(values["kl"][1:], 0.0)),
        proxy=values["proxy"][1:] - values["proxy"][0],
        gold=values["gold"][1:] - values["gold"][0],
        clusters=None,
        fits="rl",
    )
