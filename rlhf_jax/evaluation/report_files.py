"""Reads what runs have written, for their reports. Imports errors and metrics.

Nothing is computed here: a report shows the numbers of ``metrics.jsonl``, ``summary.json`` and the other files of a
run as they are.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax import storage
from rlhf_jax.errors import InputError
from rlhf_jax.metrics import read_metrics
from rlhf_jax.storage import Path

# The order in which a ladder is climbed; runs of other names come last, by name.
LADDER = ("sft", "reward_model", "ppo", "ppo_no_leash", "dpo")
EVALUATION = "evaluate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run directory.

    name: of its directory. stage, config, inputs: of ``config.json``. rows: of ``metrics.jsonl``. data: of
    ``data.json``. handoff: of ``handoff.json`` (model, facts, code_version). margins: of ``margins.json``. policies,
    samples: of the ``summary.json`` and ``samples.json`` of an evaluation. What is not there is empty.
    """

    name: str
    stage: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    rows: Sequence[Mapping[str, float]]
    data: Mapping[str, Any]
    handoff: Mapping[str, Any]
    margins: Mapping[str, Any]
    policies: Mapping[str, Mapping[str, Any]]
    samples: Mapping[str, Sequence[Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ladder:
    """The runs of a ladder and what was found of its policies.

    runs: name -> run, in the order of ``LADDER``; the evaluation apart. evaluation: its run, or None. reward_model,
    policies, seconds: of the ladder's ``summary.json``; policies maps name -> proxy, gold, kl, length, distinct_2.
    """

    name: str
    runs: Mapping[str, Run]
    evaluation: Run | None
    reward_model: Mapping[str, Any]
    policies: Mapping[str, Mapping[str, Any]]
    seconds: Mapping[str, float]

    @property
    def samples(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        return self.evaluation.samples if self.evaluation else {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One evaluation of a policy during training: KL to the reference in nats, proxy, gold (None if there is none)."""

    step: int
    kl: float
    proxy: float
    gold: float | None


def is_run(directory: Path) -> bool:
    """Whether a directory's ``config.json`` is that of a run, and not, say, of an exported model."""
    path = directory / "config.json"
    if not path.is_file():
        return False
    try:
        description = json.loads(path.read_bytes())
    except ValueError:
        return True  # reading it says what is wrong
    return isinstance(description, dict) and "stage" in description


def read_run(directory: Path) -> Run:
    """A run from its directory.

    Raises:
      InputError: ``config.json`` or ``metrics.jsonl`` (of an evaluation: ``summary.json``) is missing, or a file is
        damaged.
    """
    description = _read_object(directory / "config.json")
    stage = str(description.get("stage", directory.name))
    handoff = directory / "handoff" / "handoff.json"
    evaluates = stage == EVALUATION
    return Run(
        name=_name_of(directory),
        stage=stage,
        config=description.get("config", {}),
        inputs=description.get("inputs", {}),
        rows=() if evaluates else _read_rows(directory / "metrics.jsonl"),
        data=_read_if_there(directory / "data.json"),
        handoff=_read_if_there(handoff),
        margins=_read_if_there(directory / "margins.json"),
        policies=_read_object(directory / "summary.json") if evaluates else {},
        samples=_read_if_there(directory / "samples.json"),
    )


def read_ladder(directory: Path) -> Ladder:
    """A ladder from its directory: ``summary.json``, and one run directory a stage.

    Raises:
      InputError: ``summary.json`` or its policies are missing, there is no run, or a run cannot be read.
    """
    summary = _read_object(directory / "summary.json")
    policies = summary.get("policies")
    if not isinstance(policies, dict) or not policies:
        raise InputError(f"{directory / 'summary.json'} has no policies; run the ladder to its end")
    names = sorted(path.name for path in directory.iterdir() if is_run(path))
    runs = {name: read_run(directory / name) for name in sorted(names, key=_place_in_ladder)}
    if not runs:
        raise InputError(f"{directory} holds no run (a directory with config.json); run the ladder first")
    return Ladder(
        name=_name_of(directory),
        runs={name: run for name, run in runs.items() if run.stage != EVALUATION},
        evaluation=next((run for run in runs.values() if run.stage == EVALUATION), None),
        reward_model=summary.get("reward_model", {}),
        policies=policies,
        seconds=summary.get("seconds", {}),
    )


def is_number(value: Any) -> bool:
    """Whether a value that was read can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def series(rows: Sequence[Mapping[str, float]], name: str) -> list[tuple[int, float]]:
    """(step, value) of every row that has a finite value of that name."""
    return [(row["step"], row[name]) for row in rows if is_number(row.get(name))]


def trace(rows: Sequence[Mapping[str, float]]) -> list[Point]:
    """The evaluations of a policy while it was trained; empty for a stage that does not evaluate one."""
    names = ("eval/kl", "eval/proxy")
    return [
        Point(step=row["step"], kl=row["eval/kl"], proxy=row["eval/proxy"], gold=row.get("eval/gold"))
        for row in rows
        if all(is_number(row.get(name)) for name in names) and is_number(row.get("eval/gold", 0.0))
    ]


def _place_in_ladder(name: str) -> tuple[int, str]:
    return (LADDER.index(name) if name in LADDER else len(LADDER), name)


def _name_of(directory: Path) -> str:
    return directory.name if storage.in_bucket(directory) else directory.resolve().name


def _read_rows(path: Path) -> tuple[Mapping[str, float], ...]:
    if not path.is_file():
        raise InputError(f"{path} is missing; give the directory of a run that has taken a step")
    try:
        rows = tuple(read_metrics(path))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); run the stage again") from error
    if not rows:
        raise InputError(f"{path} has no rows; give the directory of a run that has taken a step")
    return rows


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} is missing; give the directory of a finished run or ladder") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); run the stage that writes it again") from error
    if not isinstance(value, dict):
        raise InputError(
            f"{path} holds {type(value).__name__}, not an object; run the stage that writes it again"
        )
    return value


def _read_if_there(path: Path) -> dict[str, Any]:
    return _read_object(path) if path.exists() else {}
