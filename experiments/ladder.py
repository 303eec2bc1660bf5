"""Stages in turn, each from the hand-off of the one before. Imports stages."""

from __future__ import annotations

import json
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from experiments.launch import to_fields
from rlhf_jax import checkpoints
from rlhf_jax.errors import InputError
from rlhf_jax.metrics import read_metrics
from rlhf_jax.stages import config as configs
from rlhf_jax.stages import dpo, evaluate, ppo, reward_model, sft
from rlhf_jax.stages.run_directory import changed_inputs
from rlhf_jax.training.interrupt import Interrupted, StopRequest

STAGES = ("sft", "reward_model", "ppo", "ppo_no_leash", "dpo", "evaluate")
POLICIES = ("ppo", "ppo_no_leash", "dpo")
_CONFIGS = {
    "sft": sft.Config,
    "reward_model": reward_model.Config,
    "ppo": ppo.Config,
    "ppo_no_leash": ppo.Config,
    "dpo": dpo.Config,
    "evaluate": evaluate.Config,
}
# What all stages share; a ladder's config has these once, at its top.
SHARED = ("seed", "data", "model")


def own_fields(config: Any) -> dict[str, Any]:
    """A stage's config as a dict, without what the ladder's config holds for all stages."""
    return {name: value for name, value in to_fields(config).items() if name not in SHARED}


def stage_configs(config: Mapping[str, Any]) -> dict[str, Any]:
    """The frozen config of every stage from a ladder's config.

    Raises:
      InputError: a field that does not exist or has the wrong type, or a missing stage.
    """
    unknown = sorted(set(config) - set(SHARED) - set(STAGES))
    if unknown:
        raise InputError(f"config.{unknown[0]} does not exist; a ladder has {', '.join(SHARED + STAGES)}")
    missing = [name for name in SHARED + STAGES if name not in config]
    if missing:
        raise InputError(f"config.{missing[0]} is missing; a ladder has {', '.join(SHARED + STAGES)}")
    built = {}
    for stage, cls in _CONFIGS.items():
        shared = {name: config[name] for name in SHARED if name in cls.__dataclass_fields__}
        built[stage] = configs.from_dict(cls, {**config[stage], **shared}, f"config.{stage}")
    return built


def run(
    config: Mapping[str, Any],
    workdir: pathlib.Path,
    *,
    stages: Sequence[str],
    again: bool,
    parallelism: str,
    mesh: jax.sharding.Mesh,
    stop: StopRequest,
) -> None:
    """Runs ``stages`` in ladder order.

    Args:
      config: a ladder's config as nested dicts.
      workdir: holds one directory a stage.
      stages: their names; ``evaluate`` always measures anew.
      again: whether a stage that is finished is run again, its old directory kept aside.
      parallelism, mesh: see ``parallel.mesh``.
      stop: passed on.

    Raises:
      InputError: from any stage, before it trains.
      Interrupted: stopped on request.
    """
    unknown = [name for name in stages if name not in STAGES]
    if unknown:
        raise InputError(f"--stages has {unknown[0]!r}; the stages are {', '.join(STAGES)}")
    built = stage_configs(config)
    for name, stage in _runners(built, workdir, parallelism, mesh, stop).items():
        directory = workdir / name
        if name not in stages:
            continue
        if stop.requested is not None:
            raise Interrupted(f"{stop.requested}: stopped before {name}; run the same command again to go on")
        if name == "evaluate":
            # Derived from the stages, and quick: measured anew, never kept beside policies that have changed.
            shutil.rmtree(directory, ignore_errors=True)
        elif checkpoints.is_finished(directory):
            if not again:
                print(f"{name} is finished in {directory}", file=sys.stderr)
                continue
            _keep_aside(directory)
        started = time.monotonic()
        stage()
        print(f"{name} took {time.monotonic() - started:.0f} s", file=sys.stderr)


def _runners(
    built: Mapping[str, Any],
    workdir: pathlib.Path,
    parallelism: str,
    mesh: jax.sharding.Mesh,
    stop: StopRequest,
) -> dict[str, Callable[[], Any]]:
    start, reward = str(workdir / "sft"), str(workdir / "reward_model")
    common = {"parallelism": parallelism, "mesh": mesh, "stop": stop}

    def run_ppo(name: str) -> None:
        ppo.run(built[name], workdir / name, init_from=start, reward_from=reward, **common)

    return {
        "sft": lambda: sft.run(built["sft"], start, **common),
        "reward_model": lambda: reward_model.run(built["reward_model"], reward, init_from=start, **common),
        "ppo": lambda: run_ppo("ppo"),
        "ppo_no_leash": lambda: run_ppo("ppo_no_leash"),
        "dpo": lambda: dpo.run(built["dpo"], workdir / "dpo", init_from=start, **common),
        "evaluate": lambda: evaluate.run(
            built["evaluate"],
            workdir / "evaluate",
            reference_from=start,
            reward_from=reward,
            policies_from={name: str(workdir / name) for name in POLICIES},
            mesh=mesh,
            stop=stop,
        ),
    }


def unfit(workdir: pathlib.Path) -> list[str]:
    """Why policies cannot be compared yet: stages that are not finished, or were made from what has changed since."""
    problems = []
    for name in STAGES[:-1]:
        if not checkpoints.is_finished(workdir / name):
            problems.append(f"{name} has not been run to its end")
        elif changed_inputs(workdir / name):
            problems.append(f"{name} was made from another {' and '.join(changed_inputs(workdir / name))}")
    return problems


def write_summary(workdir: pathlib.Path) -> dict[str, Any]:
    """Gathers ``summary.json``: the reward model against its ceiling, and every policy with its curve."""
    facts = checkpoints.load_handoff(workdir / "reward_model")[0].facts
    found = {"accuracy": facts["eval/accuracy"]}
    found |= {
        name: facts[name] for name in ("bayes_accuracy", "longer_wins", "calibration_error") if name in facts
    }
    policies = json.loads((workdir / "evaluate" / evaluate.SUMMARY).read_text())
    names = {"eval/kl": "kl", "eval/proxy": "proxy", "eval/gold": "gold", "eval/length": "length"}
    for policy in ("ppo", "ppo_no_leash"):
        policies[policy]["curve"] = [
            {"iteration": row["step"], **{short: row[long] for long, short in names.items() if long in row}}
            for row in read_metrics(workdir / policy / "metrics.jsonl")
            if "eval/kl" in row
        ]
        if all("gold" in point for point in policies[policy]["curve"]):
            policies[policy]["gold_curve"] = [point["gold"] for point in policies[policy]["curve"]]
    summary = {"reward_model": found, "policies": policies}
    (workdir / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def _keep_aside(directory: pathlib.Path) -> None:
    number = 1
    while (aside := directory.with_name(f"{directory.name}.{number}")).exists():
        number += 1
    directory.rename(aside)
    print(f"{directory} was finished; it is now {aside}", file=sys.stderr)
