"""The over-optimisation lab: gold against sqrt(KL) for best-of-n and PPO, by proxy, with fitted curves and their peaks.

    python -m experiments.quickstart --workdir=runs/quickstart
    python -m experiments.overoptimization --quickstart=runs/quickstart --workdir=runs/overoptimization

Trains proxies on fewer pairs than the quickstart's reward model, and an ensemble; samples 1,024 responses a prompt from
the SFT policy and scores them with every proxy and with gold; optimises a policy against every proxy by PPO without a
leash; fits the curves of Gao, Schulman & Hilton (2023). The quickstart's own reward model and PPO runs join in. Leaves
overoptimization.json, overoptimization.html and two PNGs. Run again, it resumes; fields: --config.<part>.*.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments import launch
from rlhf_jax.errors import InputError
from rlhf_jax.evaluation import best_of_n as estimators
from rlhf_jax.evaluation import overoptimization_page as page
from rlhf_jax.evaluation.overoptimization_page import Measured
from rlhf_jax.metrics import read_metrics
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages import best_of_n, ppo, reward_model
from rlhf_jax.stages import config as configs

CONFIG = launch.define_config("overoptimization")
WORKDIR = launch.define_workdir()
QUICKSTART = flags.DEFINE_string(
    "quickstart", None, "Directory of a finished quickstart: SFT, reward model, PPO with and without its leash.",
    required=True,
)  # fmt: skip
PARALLELISM = launch.define_parallelism()
MESH = launch.define_mesh()
# Sets of prompts whose curves are independent, for the intervals of best-of-n.
NUM_SETS = 16


def main(stop):
    config, workdir = CONFIG.value.to_dict(), pathlib.Path(WORKDIR.value)
    start = pathlib.Path(QUICKSTART.value)
    mesh = meshes.make_mesh(MESH.value)
    how = {"parallelism": PARALLELISM.value, "mesh": mesh, "stop": stop}
    proxies = {"quickstart": start / "reward_model"}
    for name in config["proxies"]:
        proxies[name] = workdir / f"reward_{name}"
        built = _built(reward_model.Config, config, config["proxies"][name], f"config.proxies.{name}", name)
        reward_model.run(built, proxies[name], init_from=str(start / "sft"), **how)
    scores = best_of_n.run(
        _built(best_of_n.Config, config, config["best_of_n"], "config.best_of_n"),
        workdir / "best_of_n",
        policy_from=str(start / "sft"),
        rewards_from={name: str(path) for name, path in proxies.items()},
        mesh=mesh,
        stop=stop,
    )
    runs = {"quickstart": start / "ppo_no_leash", "quickstart, leashed": start / "ppo"}
    for name in config["proxies"]:
        runs[name] = workdir / f"ppo_{name}"
        built = _built(ppo.Config, config, config["ppo"], "config.ppo")
        where = {"init_from": str(start / "sft"), "reward_from": str(proxies[name])}
        ppo.run(built, runs[name], **where, **how)
    sampled = {name: of_best_of_n(scores[name], scores["gold"]) for name in proxies}
    trained = {name: of_run(path) for name, path in runs.items()}
    summary = page.write(workdir, best_of_n=sampled, rl=trained, seed=config["seed"])
    print(json.dumps(summary["peaks"], indent=1))
    print(workdir / page.PAGE)


def _built(
    cls: type, config: Mapping[str, Any], fields: Mapping[str, Any], where: str, proxy: str = ""
) -> Any:
    """A stage's config from its part of the lab's; of a proxy, with as many pairs as it may see."""
    data = config["data"]
    if proxy:
        if proxy not in config["num_preferences"]:
            raise InputError(
                f"config.num_preferences.{proxy} is missing; say how many pairs the proxy is trained on"
            )
        data = {**data, "world": {**data["world"], "num_preferences": config["num_preferences"][proxy]}}
    return configs.from_dict(cls, {**fields, "seed": config["seed"], "data": data}, where)


def of_best_of_n(proxy: np.ndarray, gold: np.ndarray) -> Measured:
    """Gains of best-of-n at powers of two from 2 to N, of `NUM_SETS` sets of prompts; arrays are [P, N]."""
    ns = [2**k for k in range(1, int(math.log2(proxy.shape[1])) + 1)]
    found = estimators.measurements(proxy, gold, ns, num_sets=min(NUM_SETS, len(proxy)))
    return Measured(
        distance=found.distance, proxy=found.proxy, gold=found.gold, clusters=found.clusters, fits="best_of_n"
    )


def of_run(path: pathlib.Path) -> Measured:
    """Gains of a run at its evaluations over what it started from."""
    rows: Sequence[Mapping[str, float]] = [
        row for row in read_metrics(path / "metrics.jsonl") if "eval/gold" in row
    ]
    if len(rows) < 2:
        raise InputError(f"{path} has {len(rows)} evaluations with a gold reward; give a finished quickstart")
    values = {name: np.array([row[f"eval/{name}"] for row in rows]) for name in ("kl", "proxy", "gold")}
    return Measured(
        distance=np.sqrt(np.maximum(values["kl"][1:], 0.0)),
        proxy=values["proxy"][1:] - values["proxy"][0],
        gold=values["gold"][1:] - values["gold"][0],
        clusters=None,
        fits="rl",
    )


if __name__ == "__main__":
    launch.launch(main)
