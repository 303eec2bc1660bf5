"""Prepared sets: rows on disk as array records, opened at once and read one by one; imports builders, readers.

A prepared set is a directory: a TFDS data set; ``groups.npy`` (digests of each row's group and of its prompt, so that
neither a split nor finding each prompt once reads a row); and ``prepared.json`` (where the rows came from, what was
left out and why, SHA-256 of the sources and of what was written). It is made beside its place and renamed, so that it
is there whole or not at all.
"""

from __future__ import annotations

import array
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from rlhf_jax.data import builders, files, readers, tfds_source
from rlhf_jax.data.rows import Row, group_of
from rlhf_jax.errors import InputError

MANIFEST = "prepared.json"
GROUPS = "groups.npy"
FORMAT = 1
_ROWS_A_SHARD = 100_000
# TFDS writes its description anew each time it is given rows.
_ROWS_A_WRITE = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What a file was: path, bytes, modification time in nanoseconds, and SHA-256."""

    path: str
    size: int
    modified: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What ``prepared.json`` says.

    kind: a key of `builders.KINDS`. source: as it was given. rows, records, skipped: see `readers.ReadReport`.
    sources: the files it was made from. written: the array records and groups, by paths within the directory. shards:
    the directory that the sources are all files of; "" where there was none.
    """

    kind: str
    source: str
    rows: int
    records: int
    skipped: tuple[tuple[str, str], ...]
    sources: tuple[Fingerprint, ...]
    written: tuple[Fingerprint, ...]
    shards: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PreparedRows(Sequence):
    """Some rows of a prepared set, in some order; each is read when it is asked for.

    source: all rows, as examples. decode: from an example to a row. indices: [N] int64, which rows.
    directory: where the set lies. digest: SHA-256 of what was written there. view: what ``convert`` makes of its rows,
    in a word; "" where they are as written.
    """

    source: Any
    decode: Callable[[Any], Row]
    indices: np.ndarray
    directory: pathlib.Path
    digest: str
    view: str = ""

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return self.select(np.arange(len(self))[place])
        return self.decode(self.source[int(self.indices[place])])

    def select(self, places: np.ndarray) -> PreparedRows:
        """The rows at some places of this selection, [M] int."""
        return dataclasses.replace(self, indices=self.indices[np.asarray(places, np.int64)])

    def convert(self, function: Callable[[Row], Row], view: str) -> PreparedRows:
        """What ``function``, which a worker process must be able to receive, makes of each row when it is read."""
        decode = functools.partial(_converted, function, self.decode)
        return dataclasses.replace(self, decode=decode, view=f"{self.view}/{view}")

    def fetch(self, places: np.ndarray) -> list[Row]:
        """The rows at some places, read together."""
        return [self.decode(example) for example in self.source.__getitems__(self.indices[places].tolist())]


def _converted(function: Callable[[Row], Row], decode: Callable[[Any], Row], example: Any) -> Row:
    return function(decode(example))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """An opened set. groups, prompts: [N] uint64, equal for rows of one group, and for rows of one prompt."""

    manifest: Manifest
    rows: PreparedRows
    groups: np.ndarray
    prompts: np.ndarray


def is_prepared(path: str | pathlib.Path) -> bool:
    """Whether a path is of a prepared set."""
    return (pathlib.Path(path) / MANIFEST).is_file()


def prepare(
    source: str | os.PathLike,
    kind: str,
    output: str | os.PathLike,
    *,
    on_bad_row: str = "error",
    tfds_dir: str | None = None,
    progress: Callable[[int, float], None] = lambda rows, share: None,
) -> Manifest:
    """Reads a source once, in constant memory, and writes the prepared set ``output``.

    Args:
      source: a file, a directory of shards, or "tfds:NAME".
      kind: a key of `builders.KINDS`.
      output: a directory that does not exist yet.
      on_bad_row: "error" or "skip", see `readers.stream_rows`.
      tfds_dir: where TFDS keeps its data sets.
      progress: called with the number of rows so far, and the share of the source that has been read.

    Raises:
      InputError: anything about the source or a row of it, a source that changes meanwhile, ``output`` in the way or
        not writable, a full disk. Nothing is left at ``output`` then.
    """
    if kind not in builders.KINDS:
        raise InputError(f"the kind is {kind!r}: use one of {', '.join(builders.KINDS)}.")
    output = pathlib.Path(output).absolute()
    if output.exists():
        raise InputError(f"{output} exists already: give another output, or remove it first.")
    if pathlib.Path(source).absolute() in output.parents:
        raise InputError(f"{output} lies in {source}, all of which is read: give an output elsewhere.")
    records, found = _open_source(str(source), tfds_dir)
    before = [fingerprint(file) for file in found]
    tally, groups = readers.Tally(), array.array("Q")
    rows = readers.stream_rows(
        _followed(records, tally, progress),
        str(source),
        builders.KINDS[kind].to_rows,
        tally,
        on_bad_row=on_bad_row,
        flag="--on_bad_row",
    )
    partial = output.with_name(output.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_records(builders.KINDS[kind], _grouped(rows, groups), partial)
        np.save(partial / GROUPS, np.frombuffer(groups, np.uint64).reshape(-1, 2))
        for file, was in zip(found, before, strict=True):
            if _stat(file) != (was.size, was.modified):
                raise InputError(f"{file} changed while it was read: run the same command again.")
        manifest = Manifest(
            kind=kind,
            source=str(source),
            rows=tally.kept,
            records=tally.records,
            skipped=tuple(tally.skipped),
            sources=tuple(before),
            written=tuple(_relative(fingerprint(file), partial) for file in _data_files(partial)),
            shards=str(pathlib.Path(source).absolute()) if pathlib.Path(source).is_dir() else "",
        )
        _write_json(partial / MANIFEST, {"format": FORMAT, **dataclasses.asdict(manifest)})
        _sync(partial)
        os.rename(partial, output)
    except OSError as error:
        raise InputError(_cannot_write(output, error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _open_source(source: str, tfds_dir: str | None) -> tuple[Iterator[files.Record], list[pathlib.Path]]:
    if source.startswith(tfds_source.PREFIX):
        builder, split = tfds_source.open_tfds(source, data_dir=tfds_dir)
        return tfds_source.tfds_records(builder, split), tfds_source.tfds_files(builder)
    return files.records(source), files.source_files(source)


def _followed(
    records: Iterator[files.Record], tally: readers.Tally, progress: Callable[[int, float], None]
) -> Iterator[files.Record]:
    for record in records:
        progress(tally.kept, record.progress)
        yield record


def _grouped(rows: Iterator[Row], groups: array.array) -> Iterator[Row]:
    for row in rows:
        groups.extend(readers.digests((group_of(row), row.prompt)).tolist())
        yield row


def _write_records(kind: builders.Kind, rows: Iterator[Row], directory: pathlib.Path) -> None:
    """Writes the array records one after the other; TFDS's own way holds up to 1 GB of them in memory to shuffle."""
    builder = kind.builder(data_dir=str(directory), file_format="array_record")
    pathlib.Path(builder.data_dir).mkdir(parents=True)
    writer = tfds.core.SequentialWriter(
        ds_info=builder.info, max_examples_per_shard=_ROWS_A_SHARD, file_format="array_record"
    )
    writer.initialize_splits([builders.SPLIT])
    try:
        while chunk := list(itertools.islice(rows, _ROWS_A_WRITE)):
            writer.add_examples({builders.SPLIT: [kind.encode(row) for row in chunk]})
        writer.close_all()
    except (InputError, OSError):
        raise
    except Exception as error:
        # Array records are written in C++, whose errors say what the operating system said, as text.
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if os.strerror(code).lower() in str(error).lower():
                raise OSError(code, os.strerror(code)) from error
        raise


def _cannot_write(output: pathlib.Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(next(p for p in output.parents if p.exists())).free
        return (
            f"the disk of {output} is full ({error.strerror}; {free:,} bytes are left): nothing was kept; free some "
            "space, or give an output elsewhere."
        )
    return f"cannot write {output} ({error.strerror}): give an output in a directory that can be written."


def open_prepared(path: str | os.PathLike) -> Prepared:
    """A prepared set, checked against what it was when it was made.

    A file whose size and time are as they were is taken to be the same; otherwise its SHA-256 decides. A source that
    is no longer there is not missed.

    Raises:
      InputError: no prepared set, one of another version, a damaged one, or a source that has changed since.
    """
    directory = pathlib.Path(path).absolute()
    manifest = read_manifest(directory)
    for was in manifest.written:
        file = directory / was.path
        if not file.is_file():
            raise InputError(f"{directory} lacks {was.path}: prepare it again.")
        if _changed(file, was):
            raise InputError(
                f"{file} is not what was written (its SHA-256 differs): restore it, or prepare the set again."
            )
    for was in manifest.sources:
        file = pathlib.Path(was.path)
        if file.exists() and _changed(file, was):
            raise InputError(
                f"{file} has changed since {directory} was prepared from it (its SHA-256 differs): prepare it again, "
                "or restore the file."
            )
    _check_shards(directory, manifest)
    kind = builders.KINDS[manifest.kind]
    source = _data_source(directory)
    groups = np.load(directory / GROUPS, allow_pickle=False)
    if not len(source) == len(groups) == manifest.rows:
        raise InputError(
            f"{directory} holds {len(source)} rows and {len(groups)} groups where {manifest.rows} were written: "
            "prepare it again."
        )
    rows = PreparedRows(
        source=source,
        decode=kind.decode,
        indices=np.arange(len(source), dtype=np.int64),
        directory=directory,
        digest=hashlib.sha256("".join(was.sha256 for was in manifest.written).encode()).hexdigest(),
    )
    return Prepared(manifest=manifest, rows=rows, groups=groups[:, 0], prompts=groups[:, 1])


def _check_shards(directory: pathlib.Path, manifest: Manifest) -> None:
    """Refuses a set whose source directory has shards that were not there."""
    if not manifest.shards or not pathlib.Path(manifest.shards).is_dir():
        return
    known = {was.path for was in manifest.sources}
    for file in files.shards(manifest.shards):
        if str(file) not in known:
            raise InputError(
                f"{file} was not there when {directory} was prepared from {manifest.shards}: prepare it again, or "
                "move the file elsewhere."
            )


def read_manifest(directory: pathlib.Path) -> Manifest:
    """What ``prepared.json`` of a directory says.

    Raises:
      InputError: it is not there, cannot be read, or is of another version.
    """
    path = directory / MANIFEST
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.pop("format") != FORMAT:
            raise InputError(f"{path} is of another version of this project: prepare the set again.")
        prints = {name: tuple(Fingerprint(**f) for f in value[name]) for name in ("sources", "written")}
        skipped = tuple((source, reason) for source, reason in value["skipped"])
        return Manifest(**{**value, **prints, "skipped": skipped})
    except FileNotFoundError:
        raise InputError(f"{directory} is no prepared set: make one with experiments.prepare_data.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read ({error}): prepare the set again.") from None


def first_of_each_prompt(prepared: Prepared, rows: PreparedRows) -> PreparedRows:
    """Those of ``rows`` whose prompt has not come before, in order."""
    _, places = np.unique(prepared.prompts[rows.indices], return_index=True)
    return rows.select(np.sort(places))


def fingerprint(file: pathlib.Path) -> Fingerprint:
    """What a file is now.

    Raises:
      InputError: it cannot be read.
    """
    try:
        size, modified = _stat(file)
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise files.unreadable(file, error) from None
    return Fingerprint(path=str(file.absolute()), size=size, modified=modified, sha256=digest)


def _changed(file: pathlib.Path, was: Fingerprint) -> bool:
    size, modified = _stat(file)
    if size != was.size:
        return True
    return modified != was.modified and fingerprint(file).sha256 != was.sha256


def _stat(file: pathlib.Path) -> tuple[int, int]:
    found = files.stat(file)
    return found.st_size, found.st_mtime_ns


def _data_files(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(file for file in directory.rglob("*") if file.is_file())


def _relative(was: Fingerprint, directory: pathlib.Path) -> Fingerprint:
    return dataclasses.replace(was, path=str(pathlib.Path(was.path).relative_to(directory)))


def _data_source(directory: pathlib.Path) -> Any:
    (info,) = directory.glob("*/*/dataset_info.json")
    return tfds.builder_from_directory(info.parent).as_data_source(builders.SPLIT)


def _write_json(path: pathlib.Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1)


def _sync(directory: pathlib.Path) -> None:
    """Has everything reach the disk, so that a crash after the rename finds it whole."""
    for file in _data_files(directory):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
