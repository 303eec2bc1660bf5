"""Reads preference, demonstration and prompt files into rows; imports rows and errors only.

Whatever is wrong with a file is one `InputError` sentence that names the file, the line, and what to do
about it. Preference files are JSON Lines, plain or gzipped, in three shapes, told apart row by row by the
fields they have:

- ``prompt``, ``chosen``, ``rejected``;
- ``topic``, ``stance``, ``chosen``, ``rejected`` (argument pairs): the prompt is made of topic and stance,
  and the topic is the group, so that both stances of a topic stay on one side of a split;
- ``chosen``, ``rejected`` alone (transcripts, as in HH-RLHF): the prompt is what both share, up to and with
  the last "\\n\\nAssistant:" in it.

Responses lose the white space around them; prompts are kept as they are.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import pathlib
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from rlhf_jax.data.rows import Demonstration, Preference, Prompt
from rlhf_jax.errors import InputError

Row = TypeVar("Row")
GroupedRow = TypeVar("GroupedRow", Preference, Demonstration)

ASSISTANT_TURN = "\n\nAssistant:"
_RESPONSE_FIELDS = ("response", "completion", "output")
_CONTEXT_FIELDS = ("context", "input")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadReport:
    """kept: how many rows were read. skipped: (source, reason) of each row left out on request."""

    kept: int
    skipped: tuple[tuple[str, str], ...] = ()


class _BadRow(Exception):
    """What is wrong with one row, as the end of a sentence that begins with the row's place."""


def read_preferences(
    path: str | pathlib.Path, *, on_bad_row: str = "error"
) -> tuple[list[Preference], ReadReport]:
    """Preference pairs of a ``.jsonl`` or ``.jsonl.gz`` file, with a report of what was left out.

    on_bad_row: "error" raises `InputError` at the first bad row; "skip" leaves bad rows out and reports
      each. A file that cannot be read to its end, or that has no good row, is an `InputError` either way.
    """
    return _read(path, _preference, on_bad_row=on_bad_row, kinds=(".jsonl", ".jsonl.gz"))


def read_demonstrations(
    path: str | pathlib.Path, *, on_bad_row: str = "error"
) -> tuple[list[Demonstration], ReadReport]:
    """Demonstrations of a ``.json`` (one list) or ``.jsonl`` file, plain or gzipped, and a report.

    A row has ``prompt`` or ``instruction`` (with an optional ``context`` or ``input``, appended after a blank
    line), and one of ``response``, ``completion``, ``output``.
    """
    kinds = (".json", ".json.gz", ".jsonl", ".jsonl.gz")
    return _read(path, _demonstration, on_bad_row=on_bad_row, kinds=kinds)


def read_prompts(path: str | pathlib.Path, *, on_bad_row: str = "error") -> tuple[list[Prompt], ReadReport]:
    """Prompts: the ``prompt`` of each row of a JSON file, or each line of a ``.txt`` that is not blank."""
    kinds = (".txt", ".txt.gz", ".json", ".json.gz", ".jsonl", ".jsonl.gz")
    return _read(path, _prompt, on_bad_row=on_bad_row, kinds=kinds)


def split_by_group(
    rows: Sequence[GroupedRow], *, held_out_fraction: float, seed: int
) -> tuple[list[GroupedRow], list[GroupedRow]]:
    """(training rows, held-out rows), each in the order given; no `Preference.group` is divided.

    The group of a demonstration, and of a pair without one, is its prompt.

    Groups are shuffled by the seed and held out one by one until at least ``held_out_fraction`` of the rows
    are; one group always remains for training. Raises `InputError` if the fraction is not in [0, 1) or only
    one group exists.
    """
    if not 0.0 <= held_out_fraction < 1.0:
        raise InputError(f"held_out_fraction is {held_out_fraction}: give at least 0 and below 1.")
    if held_out_fraction == 0.0:
        return list(rows), []
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[_group(row)] = sizes.get(_group(row), 0) + 1
    if len(sizes) < 2:
        raise InputError(
            f"the {len(rows)} rows form {len(sizes)} group(s), of which none can be held out: give rows "
            "of at least two groups, or a held-out fraction of 0."
        )
    groups = sorted(sizes)
    random.Random(seed).shuffle(groups)
    held_out: set[str] = set()
    count = 0
    for group in groups[:-1]:
        if count >= held_out_fraction * len(rows):
            break
        held_out.add(group)
        count += sizes[group]
    train = [row for row in rows if _group(row) not in held_out]
    return train, [row for row in rows if _group(row) in held_out]


def longer_wins(rows: Sequence[Preference]) -> float:
    """The accuracy of "the longer response, in characters, is the better one"; a tie counts one half."""
    if not rows:
        raise InputError("longer_wins was asked about no rows: give at least one preference pair.")
    points = (0.5 + 0.5 * _sign(len(row.chosen) - len(row.rejected)) for row in rows)
    return sum(points) / len(rows)


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)


def _group(row: Preference | Demonstration) -> str:
    return row.prompt if isinstance(row, Demonstration) or not row.group else row.group


def _read(
    path: str | pathlib.Path, to_row: Callable[[Any, str], Row], *, on_bad_row: str, kinds: tuple[str, ...]
) -> tuple[list[Row], ReadReport]:
    if on_bad_row not in ("error", "skip"):
        raise InputError(f"on_bad_row is {on_bad_row!r}: use 'error' or 'skip'.")
    path = pathlib.Path(path)
    if not path.name.endswith(kinds):
        raise InputError(
            f"{path} is not of a kind that is read here: give a file ending in {', '.join(kinds)}."
        )
    rows: list[Row] = []
    skipped: list[tuple[str, str]] = []
    place = "row" if path.name.endswith((".json", ".json.gz")) else "line"
    for number, parse in _records(path):
        source = f"{path.name}:{number}"
        try:
            rows.append(to_row(parse(), source))
        except _BadRow as bad:
            if on_bad_row == "error":
                raise InputError(
                    f"{place} {number} of {path} {bad}: mend it or pass --config.data.on_bad_row=skip."
                ) from None
            skipped.append((source, str(bad)))
    if not rows:
        why = "no rows"
        if skipped:
            why = f"no usable row (all {len(skipped)} were skipped, the first because it {skipped[0][1]})"
        raise InputError(f"{path} has {why}: give a file with at least one.")
    return rows, ReadReport(kept=len(rows), skipped=tuple(skipped))


def _records(path: pathlib.Path) -> Iterator[tuple[int, Callable[[], Any]]]:
    """(number from 1, a function that parses it or raises _BadRow) of each line, or each row of a list."""
    data = _bytes_of(path)
    name = path.name.removesuffix(".gz")
    if name.endswith(".json"):
        yield from _list_records(path, data)
        return
    parse = _text if name.endswith(".txt") else _json
    for number, line in enumerate(io.BytesIO(data), start=1):
        if line.strip():
            yield number, lambda line=line: parse(line)


def _list_records(path: pathlib.Path, data: bytes) -> Iterator[tuple[int, Callable[[], Any]]]:
    if not data.strip():
        return
    try:
        rows = _json(data)
    except _BadRow as bad:
        raise InputError(
            f"{path} {bad}: give a JSON list of rows, or one row a line in a .jsonl file."
        ) from None
    if not isinstance(rows, list):
        raise InputError(
            f"{path} holds {_kind(rows)} where a list of rows is expected: wrap the rows in [ ]."
        )
    for number, row in enumerate(rows, start=1):
        yield number, lambda row=row: row


def _bytes_of(path: pathlib.Path) -> bytes:
    if path.is_dir():
        raise InputError(f"{path} is a directory: give the path of a file in it.")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: check the path.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check its permissions.") from None
    if not path.name.endswith(".gz") or not data:
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is not a whole gzip file ({error}): fetch or compress it again.") from None


def _text(line: bytes) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadRow(f"is not UTF-8 (byte {error.start + 1} is 0x{line[error.start]:02x})") from None
    return text.removeprefix("\ufeff").rstrip("\r\n")


def _json(line: bytes) -> Any:
    text = _text(line)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _BadRow(f"is not JSON ({error.msg} at column {error.colno})") from None
    except (RecursionError, ValueError) as error:
        raise _BadRow(f"is not JSON that can be read ({error})") from None


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    return names.get(type(value), "a number")


def _object(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise _BadRow(f"is {_kind(record)} where an object with named fields is expected")
    return record


def _field(record: dict[str, Any], name: str) -> str:
    """The text of a field that must be there and must say something."""
    if name not in record:
        had = ", ".join(repr(key) for key in list(record)[:8]) or "none"
        raise _BadRow(f"has no field '{name}' (its fields: {had})")
    value = record[name]
    if not isinstance(value, str):
        raise _BadRow(f"has {_kind(value)} in '{name}' where a string is expected")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadRow(f"has half of a surrogate pair in '{name}', which no UTF-8 text can hold") from None
    if not value.strip():
        raise _BadRow(f"has an empty '{name}'")
    return value


def _preference(record: Any, source: str) -> Preference:
    record = _object(record)
    chosen, rejected = _field(record, "chosen"), _field(record, "rejected")
    if chosen == rejected:
        raise _BadRow("has 'chosen' equal to 'rejected', so that neither can be preferred")
    group = ""
    if "prompt" in record:
        prompt = _field(record, "prompt")
    elif "topic" in record and "stance" in record:
        group = _field(record, "topic")
        prompt = f"Topic: {group}\nStance: {_field(record, 'stance')}\nArgument:"
    else:
        prompt, chosen, rejected = _split_transcripts(chosen, rejected)
    chosen, rejected = chosen.strip(), rejected.strip()
    if chosen == rejected:
        raise _BadRow("has 'chosen' equal to 'rejected' but for blanks around them")
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected, source=source, group=group)


def _split_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    shared = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        shared += 1
    start = chosen.rfind(ASSISTANT_TURN, 0, shared)
    if start < 0:
        raise _BadRow(
            "has no 'prompt', and its 'chosen' and 'rejected' share no beginning up to an '\\n\\nAssistant:'"
        )
    end = start + len(ASSISTANT_TURN)
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text[end:].strip():
            raise _BadRow(f"has nothing after the shared '\\n\\nAssistant:' in '{name}'")
    return chosen[:end], chosen[end:], rejected[end:]


def _demonstration(record: Any, source: str) -> Demonstration:
    record = _object(record)
    prompt = _field(record, "prompt" if "prompt" in record or "instruction" not in record else "instruction")
    context = next((name for name in _CONTEXT_FIELDS if record.get(name) not in (None, "")), None)
    if "prompt" not in record and context is not None:
        prompt = f"{prompt}\n\n{_field(record, context)}"
    name = next((name for name in _RESPONSE_FIELDS if name in record), "response")
    return Demonstration(prompt=prompt, response=_field(record, name).strip(), source=source)


def _prompt(record: Any, source: str) -> Prompt:
    record = {"prompt": record} if isinstance(record, str) else _object(record)
    return Prompt(prompt=_field(record, "prompt"), source=source)
