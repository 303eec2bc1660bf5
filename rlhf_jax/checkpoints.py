"""Orbax checkpoints: exact resume within a stage, and the hand-off from one stage to the next.

Imports errors, storage, hosts. A run directory (here, or in a bucket: see ``storage``) holds ``checkpoints/<step>/``,
one bundle of everything the next step depends on (train state, data iterator, host counters), and, once the stage is
done, ``handoff/``: params, tokenizer, and a ``handoff.json`` that says what they are. Both appear whole or not at all:
on disks by a rename, in a bucket by the object that is written last. Digests of every file let a damaged checkpoint be
named and skipped: SHA-256; of a checkpoint in a bucket the CRC-32C that the bucket keeps, which costs no reading.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from absl import logging

from rlhf_jax import storage
from rlhf_jax.errors import InputError
from rlhf_jax.parallel import hosts
from rlhf_jax.storage import Path


class Checkpoints:
    """The checkpoints of one run: asynchronous, atomic, the newest ``keep`` of them kept.

    Every process of a job calls every method; what lies in a directory is decided by the first of them.

    Raises:
      InputError: if the directory cannot be made, written or read.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int = 2, keep_every: int = 0):
        """``keep_every``: checkpoints of steps that it divides are kept for good; 0: none."""
        self.directory = storage.absolute(storage.at(workdir)) / "checkpoints"
        # After a step's number: the digests of its files.
        self._digests = ".crc32c.json" if storage.in_bucket(self.directory) else ".sha256.json"
        hosts.decided_by_main(self._prepare)
        with storage.reached(self.directory):
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep, keep_period=keep_every or None, create=False
                ),
            )
        self._finisher = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="finish-checkpoint")
        self._finishing: futures.Future | None = None
        self._step = 0

    def save(self, step: int, state: Any, iterator: grain.DatasetIterator, host: Mapping[str, Any]) -> None:
        """Starts saving a bundle; returns once the state is copied, before it is on disk.

        Args:
          step: the number of finished steps.
          state: a pytree of arrays and typed keys.
          iterator: its position is saved as of this call; a JSON-able state, the same on every process.
          host: JSON-able counters.

        Raises:
          InputError: this or the save before it cannot be written; what was whole still is.
        """
        self.wait()
        self._step = step
        with self._said_in_a_sentence(step):
            if hosts.is_main():
                # Of an earlier checkpoint of this step that somebody removed: they would call this one damaged.
                self._digest_path(step).unlink(missing_ok=True)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    # Grain's own handler writes a file a process, and finds none where there are more of them.
                    data=ocp.args.JsonSave(iterator.get_state()),
                    # Written later, while the loop counts on.
                    host=ocp.args.JsonSave(copy.deepcopy(dict(host))),
                ),
                force=True,
            )
        self._finishing = self._finisher.submit(self._finish)

    def check(self) -> None:
        """Looks, without waiting, whether the save under way has failed.

        Raises:
          InputError: it has.
        """
        if self._finishing is not None and self._finishing.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the save under way is on disk, digests and all.

        Raises:
          InputError: it cannot be written.
        """
        finishing, self._finishing = self._finishing, None
        if finishing is not None:
            finishing.result()

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
            problem = hosts.decided_by_main(functools.partial(find_damage, path, self._digest_path(step)))
            if problem is None:
                restored, problem = self._read(step, abstract)
                (failed,) = hosts.largest(int(problem is not None))
                if not failed:
                    iterator.set_state(restored["data"])
                    self._set_aside(damaged)
                    return step, restored["state"], restored["host"]
                problem = problem or "another process of this job cannot read it"
            damaged[step] = f"{path}: {problem}"
            logging.warning("checkpoint %s is damaged (%s); trying the one before it", path, problem)
        if damaged:
            raise InputError(
                f"no checkpoint in {self.directory} is whole ({'; '.join(damaged.values())}); "
                "restore one from a backup, or start over with another --workdir"
            )
        return None

    def _read(self, step: int, abstract: Any) -> tuple[Any, str | None]:
        """What a checkpoint holds, or None and why this process cannot read it; others may be able to."""
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
            return None, (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return restored, None

    def close(self) -> None:
        """Waits until everything is on disk.

        Raises:
          InputError: the last save cannot be written.
        """
        try:
            self.wait()
        finally:
            self._finisher.shutdown()
            with self._said_in_a_sentence(self._step):  # Orbax says once more what failed
                self._manager.close()

    def _prepare(self) -> None:
        try:
            storage.make_directory(self.directory)
        except OSError as error:
            raise InputError(
                f"cannot write to workdir {self.directory.parent}: {error.strerror}; give a writable one"
            ) from error

    def _set_aside(self, steps: Iterable[int]) -> None:
        def rename() -> None:
            for step in steps:
                aside = self.directory / f"damaged.{step}"
                storage.remove(aside)
                (self.directory / str(step)).rename(aside)
                self._digest_path(step).unlink(missing_ok=True)

        hosts.decided_by_main(rename)
        self._manager.reload()

    def _digest_path(self, step: int) -> Path:
        return self.directory / f"{step}{self._digests}"

    def _finish(self) -> None:
        """Once a save has landed, its digests go beside it, and digests of deleted checkpoints go away.

        A checkpoint that was killed before its digests, on an earlier start, gets them now.
        """
        with self._said_in_a_sentence(self._step):
            self._manager.wait_until_finished()
            if not hosts.is_main():
                return
            steps = set(self._manager.all_steps())
            for whole in steps:
                if not self._digest_path(whole).exists():
                    _write_json(self._digest_path(whole), _standing_digests(self.directory / str(whole)))
            for path in self.directory.glob(f"*{self._digests}"):
                if path.name.removesuffix(self._digests) not in map(str, steps):
                    path.unlink()

    @contextlib.contextmanager
    def _said_in_a_sentence(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            problem = storage.problem(error)
            if problem is None:
                raise
            raise InputError(
                f"cannot save step {step} in {self.directory}: {problem}; {self._kept()}; make room or mend the disk, "
                "then run the same command again"
            ) from error

    def _kept(self) -> str:
        """What there is to go on from, for a sentence about what went wrong, and may keep it from being seen."""
        try:
            whole = [path.name for path in self.directory.glob("*") if _is_whole(path)]
        except Exception as error:
            if storage.problem(error) is None:
                raise
            return "what is saved there cannot be seen"
        return f"step {max(whole, key=int)} is saved there" if whole else "nothing was saved there yet"


def _is_whole(path: Path) -> bool:
    """Whether ``path`` is a whole checkpoint: of a bucket the one that Orbax has marked so; a disk has no others."""
    marked = not storage.in_bucket(path) or (path / "commit_success.txt").exists()
    return path.name.isdecimal() and marked


def find_damage(directory: Path, digest_path: Path) -> str | None:
    """What is wrong with the files of ``directory``, or None; without digests (killed too early) nothing is known.

    Raises:
      InputError: they cannot be read, which says nothing of them.
    """
    with storage.reached(directory):
        return _find_damage(directory, digest_path)


def _find_damage(directory: Path, digest_path: Path) -> str | None:
    if not digest_path.exists():
        return None
    try:
        digests = json.loads(digest_path.read_text())
    except ValueError:
        return f"{digest_path.name} is not JSON"
    files = storage.files(directory)
    for name, digest in digests.items():
        if name not in files:
            return f"{name} is missing"
        of_bucket = digest.startswith(_OF_BUCKET)
        if (f"{_OF_BUCKET}{files[name]}" if of_bucket else _sha256(directory / name)) != digest:
            return f"{name} does not match its {'CRC-32C' if of_bucket else 'SHA-256'}"
    foreign = set(files) - set(digests) - _BESIDE
    return f"{min(foreign)} does not belong there" if foreign else None


# Before a digest that a bucket keeps of an object; the others are SHA-256, in hex.
_OF_BUCKET = "crc32c:"


# What a hand-off holds beside the files that its digests are of.
_BESIDE = {"digests.json", "handoff.json"}


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


def handoff_path(workdir: str | os.PathLike) -> Path:
    """Where a finished run keeps its hand-off."""
    return storage.absolute(storage.at(workdir)) / "handoff"


def handoff_identity(workdir: str | os.PathLike) -> str | None:
    """SHA-256 of what a finished run left, or None where there is no hand-off: a run made from it records this."""
    digests = handoff_path(workdir) / "digests.json"
    return _sha256(digests) if digests.exists() else None


def is_finished(workdir: str | os.PathLike) -> bool:
    """Whether a run has left its hand-off (which appears whole or not at all).

    Raises:
      InputError: that cannot be seen.
    """
    path = handoff_path(workdir) / "handoff.json"
    with storage.reached(path):
        return path.exists()


# Where a hand-off keeps what was trained beside a base, where that is all that was.
ADAPTER = "adapter"


def has_adapter(handoff: Path) -> bool:
    """Whether the run of this hand-off trained an adapter."""
    return (handoff / ADAPTER).exists()


def save_handoff(
    workdir: str | os.PathLike,
    handoff: Handoff,
    params: Any,
    save_tokenizer: Callable[[Path], None],
    *,
    adapter: Any = None,
) -> Path:
    """Writes ``workdir/handoff`` aside and renames it into place; returns its path.

    In a bucket it is written in place, ``handoff.json`` last: without it there is none.

    Raises:
      InputError: the disk does not take it.
    """
    target = handoff_path(workdir)
    aside = target if storage.in_bucket(target) else target.with_name("handoff.partial")

    def begin() -> None:
        # Of a bucket what says that the rest is whole goes first.
        (aside / "handoff.json").unlink(missing_ok=True)
        storage.remove(aside)
        storage.make_directory(aside)

    def finish() -> None:
        with storage.writable(aside / "tokenizer") as directory:
            save_tokenizer(directory)
        _write_json(aside / "digests.json", _digests(aside))
        _write_json(aside / "handoff.json", dataclasses.asdict(handoff))
        if aside != target:
            os.rename(aside, target)

    try:
        hosts.decided_by_main(begin)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(aside / "params", params)
            if adapter is not None:
                checkpointer.save(aside / ADAPTER, adapter)
            checkpointer.wait_until_finished()
        hosts.decided_by_main(finish)
    except Exception as error:
        problem = storage.problem(error)
        if problem is None:
            raise
        raise InputError(
            f"cannot leave the hand-off {target}: {problem}; make room or mend the disk, then run the same command "
            "again"
        ) from error
    return target


def load_handoff(workdir: str | os.PathLike) -> tuple[Handoff, Path]:
    """Reads what a finished run left: its description and the hand-off's path.

    Raises:
      InputError: no such run, not finished, a damaged file, or one that cannot be read.
    """
    path = handoff_path(workdir)
    with storage.reached(path):
        there = path.parent.exists()
    if not there:
        raise InputError(f"there is no run at {workdir}; give the --workdir of a finished stage")
    if not is_finished(workdir):
        raise InputError(f"the run at {workdir} has left no hand-off yet; run its stage to the end first")
    damage = hosts.decided_by_main(functools.partial(find_damage, path, path / "digests.json"))
    if damage:
        raise InputError(
            f"the hand-off {path} is damaged ({damage}); run that stage again in a fresh workdir"
        )
    return _read_handoff(path), path


def facts_of(workdir: str | os.PathLike) -> dict[str, Any]:
    """The facts of a finished run's hand-off, by themselves; ``load_handoff`` looks at the rest too.

    Raises:
      InputError: its description cannot be read, or is none.
    """
    return _read_handoff(handoff_path(workdir)).facts


def _read_handoff(path: Path) -> Handoff:
    with storage.reached(path):
        described = (path / "handoff.json").read_text()
    try:
        return Handoff(**json.loads(described))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path / 'handoff.json'} is not the description of a hand-off ({error}); run that stage again in a fresh "
            "workdir"
        ) from error


def restore_params(
    path: Path,
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


def _digests(directory: Path) -> dict[str, str]:
    return {name: _sha256(directory / name) for name in sorted(storage.files(directory))}


def _standing_digests(directory: Path) -> dict[str, str]:
    """Digests of files that stay where they are: those that a bucket keeps, which takes one listing and no reading."""
    if not storage.in_bucket(directory):
        return _digests(directory)
    return {name: f"{_OF_BUCKET}{kept}" for name, kept in sorted(storage.files(directory).items())}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_json(path: Path, value: Any) -> None:
    storage.replace(path, json.dumps(value, indent=1))
