"""The directory of one run: its config, its inputs, and what it shows as it goes. Imports all below but stages."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import os
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import tqdm

from rlhf_jax import checkpoints, storage
from rlhf_jax.data import pipeline
from rlhf_jax.data.batches import EncodeReport
from rlhf_jax.errors import InputError
from rlhf_jax.metrics import written
from rlhf_jax.models import tensor_files
from rlhf_jax.parallel import hosts
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages.config import differences
from rlhf_jax.storage import Path
from rlhf_jax.training.interrupt import StopRequest


class Purpose(enum.IntEnum):
    """What a stage's key is folded with; every draw comes from one of them and then an iteration, a row, a position."""

    INIT = 0
    TRAIN = 1
    EVALUATION = 2
    ROLLOUT = 3
    SHUFFLE = 4
    DATA = 5
    ALARM = 6
    ADAPTER = 7
    SCALE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Where a run lives and what it runs on.

    workdir: its directory. stage: its stage's name. mesh, parallelism: see ``parallel.mesh``. stop: set by Ctrl-C,
    SIGTERM.
    """

    workdir: Path
    stage: str
    mesh: jax.sharding.Mesh
    parallelism: meshes.Parallelism
    stop: StopRequest

    @property
    def finished(self) -> bool:
        return checkpoints.is_finished(self.workdir)

    @property
    def share(self) -> pipeline.Share:
        """What this process reads of every batch."""
        return pipeline.Share(process_index=jax.process_index(), process_count=jax.process_count())

    def key(self, seed: int, purpose: Purpose) -> jax.Array:
        """The typed key of one purpose of this stage; no other stage or purpose of the same seed has it."""
        stage = jax.random.fold_in(jax.random.key(seed), zlib.crc32(self.stage.encode()))
        return jax.random.fold_in(stage, purpose)

    def data_seed(self, seed: int) -> int:
        """The seed of this stage's shuffling, which NumPy does: a whole number below 2**32."""
        return int(jax.random.bits(self.key(seed, Purpose.DATA)))


def open_run(
    workdir: str | os.PathLike,
    stage: str,
    config: Any,
    *,
    inputs: Mapping[str, str],
    parallelism: meshes.Parallelism,
    mesh: jax.sharding.Mesh | None,
    stop: StopRequest,
) -> Run:
    """Makes or re-enters a run directory; ``config.json`` in it says what the run is.

    ``mesh``: None puts all devices on the data axis. It is no part of what the run is: another may go on with it.

    Raises:
      InputError: the directory or an input is a URL of no bucket; an input cannot be read; the directory cannot be
        written, or belongs to a run with another config or other inputs; or the mesh splits parameters, which ``pmap``
        does not.
    """
    mesh = meshes.data_mesh() if mesh is None else mesh
    meshes.check_parallelism(mesh, parallelism)
    workdir = storage.at(workdir)
    description = {
        "stage": stage,
        "config": dataclasses.asdict(config),
        "inputs": {name: identity(path) for name, path in inputs.items()},
    }
    description = json.loads(json.dumps(description))  # tuples as the file will have them
    hosts.decided_by_main(functools.partial(_enter, workdir, description))
    return Run(workdir=workdir, stage=stage, mesh=mesh, parallelism=parallelism, stop=stop)


def _enter(workdir: Path, description: dict[str, Any]) -> None:
    """Makes the directory and says in it what the run is, or checks that it is this one."""
    path = workdir / "config.json"
    try:
        storage.make_directory(workdir)
        found = differences(_description(path), description) if path.exists() else []
        # A run that was refused before it trained has nothing to lose: its config may be mended in place.
        if found and any((workdir / name).exists() for name in _RESULTS):
            raise InputError(
                f"workdir {workdir} belongs to a run with another config ({'; '.join(found)}); "
                "give another --workdir, or the config it was started with"
            )
        storage.replace(path, json.dumps(description, indent=1))
    except Exception as error:
        problem = storage.problem(error)
        if problem is None:
            raise
        raise InputError(f"cannot write to workdir {workdir}: {problem}; give a writable one") from error


def identity(path: str) -> dict[str, str | None]:
    """Where an input lies and what it was: an input that was made anew is another input. A hub name stays one."""
    directory, objective = split_objective(path)
    place = storage.at(directory)
    with storage.reached(place):
        where = str(storage.absolute(place)) if place.exists() else directory
        where = f"{where}:{objective}" if objective else where
        return {"path": where, "handoff": checkpoints.handoff_identity(directory) or _weights(place)}


def split_objective(path: str) -> tuple[str, str]:
    """(directory, objective) of ``<run>:<objective>``, one head of several; (path, "") of any other path."""
    directory, _, objective = path.rpartition(":")
    if not directory or not objective or "/" in objective:
        return path, ""
    with storage.reached(storage.at(directory)):
        # A directory of that very name is looked for only behind a run: its name may be too long for a disk.
        is_head = is_run(storage.at(directory)) and not storage.at(path).exists()
    return (directory, objective) if is_head else (path, "")


def runs_of(value: str, *, flag: str) -> list[str]:
    """The directories that a flag names, with commas between them; none of an empty one.

    Raises:
      InputError: a comma too many.
    """
    # A directory may have a comma in its name.
    runs = [value] if os.path.exists(value) else value.split(",") if value else []
    if "" in runs:
        raise InputError(f"--{flag}={value} has a comma with no run before or after it; leave it out")
    return runs


def inputs_of(flag: str, runs: Sequence[str]) -> dict[str, str]:
    """Runs that one flag names, by the names that ``config.json`` gives them among a run's inputs."""
    if len(runs) == 1:
        return {flag: runs[0]}
    return {f"{flag}_{number}": run for number, run in enumerate(runs, 1)}


def _weights(place: Path) -> str | None:
    """What identifies a Hugging Face directory, which lies on this machine."""
    return None if storage.in_bucket(place) else tensor_files.fingerprint(place)


def changed_inputs(workdir: Path) -> list[str]:
    """Names of the inputs of a run whose hand-offs are no longer those it was made from."""
    inputs = _description(workdir / "config.json")["inputs"]
    return [name for name, was in inputs.items() if identity(was["path"])["handoff"] != was["handoff"]]


# What there is to lose in a run's directory.
_RESULTS = ("checkpoints", "handoff", "summary.json", "scores.npz")


def _description(path: Path) -> dict[str, Any]:
    """What ``config.json`` of a run's directory says.

    Raises:
      InputError: it is no run's, as in a Hugging Face directory.
    """
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); give another --workdir, or restore it") from None
    if not isinstance(description, dict) or "stage" not in description:
        raise InputError(f"{path} is not of a run of this project; give a new or an empty --workdir")
    return description


def is_run(directory: Path) -> bool:
    """Whether a directory was written by a run, finished or not."""
    with storage.reached(directory):
        if any((directory / name).exists() for name in _RESULTS):
            return True
    try:
        return "stage" in json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def write_data_report(run: Run, unreadable: Sequence[tuple[str, str]], **encoded: EncodeReport) -> None:
    """Keeps what was left out of the data or cut, and why, where the report finds it."""
    if not hosts.is_main():
        return
    value = {name: dataclasses.asdict(report) for name, report in encoded.items()}
    path = run.workdir / "data.json"
    with written(path):
        storage.replace(path, json.dumps({"unreadable": list(unreadable), **value}, indent=1))


class Progress:
    """A bar with the quantities that matter; a plain line every ``line_every`` steps when not a terminal.

    Called with (finished steps, values of this step); ``tokens`` among the values gives tokens/s. Of several processes
    the first one shows it.
    """

    def __init__(self, stage: str, num_steps: int, shown: Sequence[str], *, line_every: int):
        self._shown, self._line_every, self._num_steps, self._stage = shown, line_every, num_steps, stage
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm.tqdm(
            total=num_steps, desc=stage, disable=not (self._terminal and hosts.is_main()), dynamic_ncols=True
        )
        self._started, self._first, self._tokens = time.monotonic(), None, 0.0

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        if self._first is None:
            # The first step compiles; counting starts after it.
            self._started, self._first, self._tokens = time.monotonic(), step, -values["tokens"]
        self._tokens += values["tokens"]
        elapsed = time.monotonic() - self._started
        texts = {name: f"{values[name]:.3g}" for name in self._shown if name in values}
        if step > self._first:
            texts["tokens/s"] = f"{self._tokens / elapsed:,.0f}"
        self._bar.set_postfix(texts, refresh=False)
        self._bar.update(step - self._bar.n)
        if (
            hosts.is_main()
            and not self._terminal
            and (step % self._line_every == 0 or step == self._num_steps)
        ):
            left = elapsed / max(step - self._first, 1) * (self._num_steps - step)
            line = " ".join(f"{name} {text}" for name, text in texts.items())
            print(
                f"{self._stage} {step}/{self._num_steps} {line} left {left:.0f}s", file=sys.stderr, flush=True
            )

    def close(self) -> None:
        self._bar.close()
