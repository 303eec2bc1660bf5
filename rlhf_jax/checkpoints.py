"""Orbax checkpoints: exact resume within a stage, and the hand-off from one stage to the next. Imports errors only.

A run directory holds ``checkpoints/<step>/`` (one bundle of everything the next step depends on: train state, data
iterator, host counters) and, once the stage is done, ``handoff/`` (params, tokenizer, and a ``handoff.json`` that
says what they are). Both are written asynchronously or aside and appear whole or not at all; SHA-256 digests of every
file let a damaged checkpoint be named and skipped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from absl import logging

from rlhf_jax.errors import InputError


class Checkpoints:
    """The checkpoints of one run: asynchronous, atomic, the newest ``keep`` of them kept.

    Raises:
      InputError: if the directory cannot be made or written.
    """

    def __init__(self, workdir: pathlib.Path, *, keep: int = 2):
        self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot write to workdir {workdir}: {error.strerror}; give a writable one"
            ) from error
        self._manager = ocp.CheckpointManager(
            self.directory, options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=False)
        )

    def save(self, step: int, state: Any, iterator: grain.DatasetIterator, host: Mapping[str, Any]) -> None:
        """Starts saving a bundle; returns once the state is copied, before it is on disk.

        Args:
          step: the number of finished steps.
          state: a pytree of arrays and typed keys.
          iterator: its position is saved as of this call; a JSON-able state, the same on every process.
          host: JSON-able counters.
        """
        self._write_digests()
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                # Grain's own handler writes a file a process, and finds none where there are more of them, or fewer.
                data=ocp.args.JsonSave(iterator.get_state()),
                host=ocp.args.JsonSave(dict(host)),
            ),
            force=True,
        )

    def restore_newest(self, state: Any, iterator: grain.DatasetIterator) -> tuple[int, Any, dict] | None:
        """The newest sound checkpoint as (step, state, host), or None if there is none at all.

        ``state`` gives structure, shapes, dtypes and shardings; ``iterator`` is moved to its saved position. A damaged
        checkpoint is named in the log and, once a sound one is found, set aside as ``damaged.<step>``, so that
        training can save that step again.

        Raises:
          InputError: if every checkpoint is damaged, or its position is of other data; nothing is deleted.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            path = self.directory / str(step)
            problem = find_damage(path, self._digest_path(step))
            if problem is None:
                try:
                    restored = self._manager.restore(
                        step,
                        args=ocp.args.Composite(
                            state=ocp.args.StandardRestore(abstract),
                            data=ocp.args.JsonRestore(),
                            host=ocp.args.JsonRestore(),
                        ),
                    )
                except Exception as error:  # Orbax and TensorStore raise many types for a torn file
                    problem = str(error).strip().splitlines()[0][:200]
                else:
                    iterator.set_state(restored["data"])
                    self._set_aside(damaged)
                    return step, restored["state"], restored["host"]
            damaged[step] = f"{path}: {problem}"
            logging.warning("checkpoint %s is damaged (%s); trying the one before it", path, problem)
        if damaged:
            raise InputError(
                f"no checkpoint in {self.directory} is whole ({'; '.join(damaged.values())}); "
                "restore one from a backup, or start over with another --workdir"
            )
        return None

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._write_digests()
        self._manager.close()

    def _set_aside(self, steps: Iterable[int]) -> None:
        for step in steps:
            aside = self.directory / f"damaged.{step}"
            shutil.rmtree(aside, ignore_errors=True)
            (self.directory / str(step)).rename(aside)
            self._digest_path(step).unlink(missing_ok=True)
        self._manager.reload()

    def _digest_path(self, step: int) -> pathlib.Path:
        return self.directory / f"{step}.sha256.json"

    def _write_digests(self) -> None:
        """Once a save has landed, its digests go beside it, and digests of deleted checkpoints go away."""
        self._manager.wait_until_finished()
        steps = set(self._manager.all_steps())
        for step in steps:
            if not self._digest_path(step).exists():
                _write_json(self._digest_path(step), _digests(self.directory / str(step)))
        for path in self.directory.glob("*.sha256.json"):
            if int(path.name.split(".")[0]) not in steps:
                path.unlink()


def find_damage(directory: pathlib.Path, digest_path: pathlib.Path) -> str | None:
    """What is wrong with the files of ``directory``, or None; without digests (killed too early) nothing is known."""
    if not digest_path.exists():
        return None
    try:
        digests = json.loads(digest_path.read_text())
    except ValueError:
        return f"{digest_path.name} is not JSON"
    for name, digest in digests.items():
        file = directory / name
        if not file.exists():
            return f"{name} is missing"
        if _sha256(file) != digest:
            return f"{name} does not match its SHA-256"
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Handoff:
    """What one stage leaves to the next.

    stage: the stage's name. model: the model config as a dict. tokenizer_fingerprint: SHA-256 of the tokenizer.
    config: the stage's config as a dict. made_from: paths of the hand-offs it started from. facts: numbers that later
    stages need or report (a reward offset, an accuracy). code_version: of rlhf_jax.
    """

    stage: str
    model: dict
    tokenizer_fingerprint: str
    config: dict
    made_from: list[str]
    facts: dict
    code_version: str


def handoff_path(workdir: pathlib.Path) -> pathlib.Path:
    """Where a finished run keeps its hand-off."""
    return pathlib.Path(workdir).absolute() / "handoff"


def handoff_identity(workdir: str | pathlib.Path) -> str | None:
    """SHA-256 of what a finished run left, or None where there is no hand-off: a run made from it records this."""
    digests = handoff_path(pathlib.Path(workdir)) / "digests.json"
    return _sha256(digests) if digests.exists() else None


def is_finished(workdir: pathlib.Path) -> bool:
    """Whether a run has left its hand-off (which appears whole or not at all)."""
    return (handoff_path(workdir) / "handoff.json").exists()


# Where a hand-off keeps what was trained beside a base, where that is all that was.
ADAPTER = "adapter"


def has_adapter(handoff: pathlib.Path) -> bool:
    """Whether the run of this hand-off trained an adapter."""
    return (handoff / ADAPTER).exists()


def save_handoff(
    workdir: pathlib.Path,
    handoff: Handoff,
    params: Any,
    save_tokenizer: Callable[[pathlib.Path], None],
    *,
    adapter: Any = None,
) -> pathlib.Path:
    """Writes ``workdir/handoff`` aside and renames it into place; returns its path."""
    target = handoff_path(workdir)
    aside = target.with_name("handoff.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(aside / "params", params)
        if adapter is not None:
            checkpointer.save(aside / ADAPTER, adapter)
        checkpointer.wait_until_finished()
    save_tokenizer(aside / "tokenizer")
    _write_json(aside / "digests.json", _digests(aside))
    _write_json(aside / "handoff.json", dataclasses.asdict(handoff))
    os.rename(aside, target)
    return target


def load_handoff(workdir: str | pathlib.Path) -> tuple[Handoff, pathlib.Path]:
    """Reads what a finished run left: its description and the hand-off's path.

    Raises:
      InputError: no such run, not finished, or a damaged file.
    """
    path = handoff_path(pathlib.Path(workdir))
    if not path.parent.exists():
        raise InputError(f"there is no run at {workdir}; give the --workdir of a finished stage")
    if not (path / "handoff.json").exists():
        raise InputError(f"the run at {workdir} has left no hand-off yet; run its stage to the end first")
    damage = find_damage(path, path / "digests.json")
    if damage:
        raise InputError(
            f"the hand-off {path} is damaged ({damage}); run that stage again in a fresh workdir"
        )
    try:
        return Handoff(**json.loads((path / "handoff.json").read_text())), path
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path / 'handoff.json'} is not the description of a hand-off ({error}); run that stage again in a fresh "
            "workdir"
        ) from error


def restore_params(
    path: pathlib.Path,
    sharding: jax.sharding.Sharding | Callable[[Any], Any] | None = None,
    *,
    name: str = "params",
) -> Any:
    """The params of a hand-off (or with ``name`` its adapter), read onto ``sharding`` (default: the first device).

    ``sharding``: one for all of them, or a function from the tree of their shapes to a tree of shardings.
    """
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path / name).item_metadata.tree
        one_for_all = isinstance(sharding, jax.sharding.Sharding)
        shardings = jax.tree.map(lambda _: sharding, metadata) if one_for_all else sharding(metadata)
        abstract = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            metadata,
            shardings,
        )
        return checkpointer.restore(path / name, abstract)


def _digests(directory: pathlib.Path) -> dict[str, str]:
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): _sha256(file) for file in files}


def _sha256(file: pathlib.Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_json(path: pathlib.Path, value: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1))
    os.replace(partial, path)
