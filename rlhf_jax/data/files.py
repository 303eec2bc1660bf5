"""Streams records out of files, without knowing what they mean; imports fields and errors only.

Read as a stream, one record in memory at a time: JSON lines and text, plain or gzipped; Parquet; directories of such
shards, in the order of their names. A ``.json`` list is parsed whole. Lines end in "\\n" or "\\r\\n",
also mixed. What is wrong with one record is a `BadRow` when it is parsed; what is wrong with a file is an `InputError`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gzip
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from rlhf_jax.data.fields import BadRow, checked, kind_of
from rlhf_jax.errors import InputError

KINDS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".txt", ".txt.gz", ".pos", ".neg")
# A longer line is no row of text but a broken file; the limit keeps memory flat whatever a file holds.
MAX_LINE_BYTES = 4 * 2**20
_PARQUET_ROWS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One record: ``source`` as error messages name it ("pairs.jsonl:7"), its place in words, and its parser.

    parse: gives the JSON value, or raises `BadRow`. progress: how much has been read with it, from 0 to 1.
    """

    source: str
    where: str
    parse: Callable[[], Any]
    progress: float


_Numbered = Iterator[tuple[int, Callable[[], Any], float]]


def source_files(path: str | pathlib.Path) -> list[pathlib.Path]:
    """The files that ``path`` stands for: itself, or the readable shards under a directory, in order of name.

    Raises:
      InputError: nothing there, or nothing of a kind that is read.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        found = shards(path)
        if not found:
            raise InputError(
                f"{path} is a directory: give the path of a file in it, or a directory that holds files ending in "
                f"{', '.join(KINDS)}."
            )
        return found
    if not path.name.endswith(KINDS):
        raise InputError(
            f"{path} is not of a kind that is read here: give a file ending in {', '.join(KINDS)}."
        )
    if not path.exists():
        raise InputError(f"{path} does not exist: check the path.")
    return [path]


def shards(directory: str | pathlib.Path) -> list[pathlib.Path]:
    """The files of a directory, at any depth, that are of a kind that is read, in order of name."""
    files = pathlib.Path(directory).rglob("*")
    return sorted(file for file in files if file.name.endswith(KINDS) and file.is_file())


def records(path: str | pathlib.Path) -> Iterator[Record]:
    """Every record of a file or of a directory of shards; blank lines are counted and passed over."""
    root = pathlib.Path(path)
    found = source_files(root)
    sizes = [stat(file).st_size for file in found]
    for place, file in enumerate(found):
        before, whole = sum(sizes[:place]), max(sum(sizes), 1)
        name = file.name if file == root else str(file.relative_to(root))
        plain = file.name.removesuffix(".gz")
        if plain.endswith(".parquet"):
            numbered, word = _parquet(file), "row"
        elif plain.endswith(".json"):
            numbered, word = _whole_list(file), "row"
        else:
            numbered, word = _lines(file, _line_parser(plain)), "line"
        for number, parse, share in numbered:
            yield Record(
                source=f"{name}:{number}",
                where=f"{word} {number} of {file}",
                parse=parse,
                progress=(before + share * sizes[place]) / whole,
            )


def stat(file: pathlib.Path) -> os.stat_result:
    """Size and times of a file.

    Raises:
      InputError: it is not there, or its directory cannot be read.
    """
    try:
        return file.stat()
    except OSError as error:
        raise unreadable(file, error) from None


def unreadable(file: pathlib.Path, error: OSError) -> InputError:
    """What to say of a source file that cannot be read."""
    remedy = "restore it, or give another source" if error.errno == errno.ENOENT else "check its permissions"
    return InputError(f"{file} cannot be read ({error.strerror}): {remedy}.")


def _line_parser(name: str) -> Callable[[bytes], Any]:
    """What a line of a file of this name is: JSON; a prompt; or a text under the label that the ending gives."""
    if name.endswith((".pos", ".neg")):
        return lambda line: {"text": _text_line(line), "label": name.endswith(".pos")}
    return _text_line if name.endswith(".txt") else parse_json


def _lines(path: pathlib.Path, parser: Callable[[bytes], Any]) -> _Numbered:
    with _opened(path) as (stream, share):
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                size = len(line)
                while not line.endswith(b"\n") and (line := stream.readline(MAX_LINE_BYTES)):
                    size += len(line)
                yield number, lambda size=size: _too_long(size), share()
            elif line.strip():
                yield number, lambda line=line: parser(line), share()


def _too_long(size: int) -> None:
    raise BadRow(f"has {size:,} bytes, more than the {MAX_LINE_BYTES:,} that a row may have")


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[tuple[IO[bytes], Callable[[], float]]]:
    """The bytes of a file, unpacked, and the share of it that has been read.

    Whatever goes wrong while they are read is an `InputError`.
    """
    try:
        size = max(path.stat().st_size, 1)
        with path.open("rb") as file:
            # An empty file is a gzip file without members, which gzip would call cut off.
            packed = path.name.endswith(".gz") and file.peek(1)
            with gzip.GzipFile(fileobj=file) if packed else contextlib.nullcontext(file) as stream:
                yield stream, lambda: min(file.tell() / size, 1.0)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is not a whole gzip file ({error}): fetch or compress it again.") from None
    except OSError as error:
        raise unreadable(path, error) from None


def _whole_list(path: pathlib.Path) -> _Numbered:
    with _opened(path) as (stream, _):
        data = stream.read()
    if not data.strip():
        return
    try:
        rows = parse_json(data)
    except BadRow as bad:
        raise InputError(
            f"{path} {bad}: give a JSON list of rows, or one row a line in a .jsonl file."
        ) from None
    if not isinstance(rows, list):
        raise InputError(
            f"{path} holds {kind_of(rows)} where a list of rows is expected: wrap the rows in [ ]."
        )
    for number, row in enumerate(rows, start=1):
        yield number, lambda row=row: row, number / len(rows)


def _parquet(path: pathlib.Path) -> _Numbered:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path} is Parquet, which pyarrow reads: pip install pyarrow.") from None
    number = 0
    stat(path)
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, lambda row=row: row, number / file.metadata.num_rows
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path} is not a whole Parquet file ({reason}): fetch or write it again.") from None


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8").removeprefix("\ufeff").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise BadRow(f"is not UTF-8 (byte {error.start + 1} is 0x{line[error.start]:02x})") from None


def _text_line(line: bytes) -> str:
    return checked(_decoded(line), "text")


def parse_json(line: bytes) -> Any:
    """The JSON value that the bytes are, or `BadRow`."""
    text = _decoded(line)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if "\0" in text:
            raise BadRow(f"is not JSON (a NUL byte at column {text.index(chr(0)) + 1})") from None
        if error.msg == "Extra data" and "\r" in text[: error.pos + 1]:
            raise BadRow("holds several rows that end in \\r alone (write its line ends as \\n)") from None
        raise BadRow(f"is not JSON ({error.msg} at column {error.colno})") from None
    except (RecursionError, ValueError) as error:
        raise BadRow(f"is not JSON that can be read ({error})") from None
