"""Reads files of preferences, demonstrations, prompts and steps into rows; imports rows, files, formats and errors.

Whatever is wrong with a file is one `InputError` sentence that names the file, the line, and what to do about it. What
files there may be is said in `files`, what their records may look like in `formats` and `formats_steps`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from rlhf_jax.data import files, formats, formats_steps
from rlhf_jax.data.fields import BadRow
from rlhf_jax.data.rows import (
    Demonstration,
    Preference,
    ProcessSteps,
    Prompt,
    Ranking,
    Unpaired,
    group_of,
)
from rlhf_jax.data.rows import Row as AnyRow
from rlhf_jax.errors import InputError

Row = TypeVar("Row", bound=AnyRow)
ToRows = Callable[[Any, str], list[Row]]
ON_BAD_ROW = ("error", "skip")
# What error messages call the option that leaves bad rows out, in the stages.
ROW_FLAG = "--config.data.on_bad_row"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadReport:
    """kept: how many rows were made. records: how many records they were made of, those left out included; one record
    may hold several rows. skipped: (source, reason) of each record left out on request.
    """

    kept: int
    records: int
    skipped: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass
class Tally:
    """Counts while rows stream by; see `ReadReport`. tied: rows whose votes are even."""

    kept: int = 0
    records: int = 0
    tied: int = 0
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def report(self) -> ReadReport:
        """What has been counted so far."""
        return ReadReport(kept=self.kept, records=self.records, skipped=tuple(self.skipped))


def read_preferences(
    path: str | pathlib.Path, *, on_bad_row: str = "error", flag: str = ROW_FLAG
) -> tuple[list[Preference], ReadReport]:
    """Preference pairs of a file or directory, with a report of what was left out; see `formats.preferences`.

    on_bad_row: "error" raises `InputError` at the first bad row; "skip" leaves bad rows out and reports
      each. A file that cannot be read to its end, or that has no good row, is an `InputError` either way.
    flag: how the user asks for the latter, for error messages.
    """
    return read_all(path, formats.preferences, on_bad_row=on_bad_row, flag=flag)


def read_demonstrations(
    path: str | pathlib.Path, *, on_bad_row: str = "error"
) -> tuple[list[Demonstration], ReadReport]:
    """Demonstrations and a report; see `formats.demonstrations`, and `read_preferences` for ``on_bad_row``."""
    return read_all(path, formats.demonstrations, on_bad_row=on_bad_row)


def read_prompts(path: str | pathlib.Path, *, on_bad_row: str = "error") -> tuple[list[Prompt], ReadReport]:
    """Prompts, with answers where there are, and a report; of a ``.txt`` each line that is not blank."""
    return read_all(path, formats.prompts, on_bad_row=on_bad_row)


def read_rankings(path: str | pathlib.Path, *, on_bad_row: str = "error") -> tuple[list[Ranking], ReadReport]:
    """Rankings and a report; see `formats.rankings`."""
    return read_all(path, formats.rankings, on_bad_row=on_bad_row)


def read_process_steps(
    path: str | pathlib.Path, *, on_bad_row: str = "error"
) -> tuple[list[ProcessSteps], ReadReport]:
    """Solutions in labelled steps and a report; see `formats_steps.process_steps`."""
    return read_all(path, formats_steps.process_steps, on_bad_row=on_bad_row)


def read_unpaired(
    path: str | pathlib.Path, *, on_bad_row: str = "error"
) -> tuple[list[Unpaired], ReadReport]:
    """Desirable and undesirable responses and a report; see `formats.unpaired`."""
    return read_all(path, formats.unpaired, on_bad_row=on_bad_row)


def read_all(
    path: str | pathlib.Path, to_rows: ToRows, *, on_bad_row: str = "error", flag: str = ROW_FLAG
) -> tuple[list, ReadReport]:
    """Every row at once; see `stream_rows`."""
    tally = Tally()
    records = files.records(path)
    rows = list(stream_rows(records, str(path), to_rows, tally, on_bad_row=on_bad_row, flag=flag))
    return rows, tally.report()


def stream_rows(
    records: Iterator[files.Record],
    name: str,
    to_rows: ToRows,
    tally: Tally,
    *,
    on_bad_row: str = "error",
    flag: str = ROW_FLAG,
) -> Iterator[Row]:
    """The rows of records, one after the other, counted in ``tally``; see `read_preferences` for ``on_bad_row``.

    Args:
      records: of `files.records`.
      name: what error messages call all of them together.
      to_rows: a function of `formats` or `formats_steps`.
      tally: is added to.
      on_bad_row: "error" or "skip".
      flag: how the user asks for the latter, for error messages.

    Raises:
      InputError: a bad row, no good row, or votes that are tied in every row.
    """
    if on_bad_row not in ON_BAD_ROW:
        raise InputError(f"on_bad_row is {on_bad_row!r}: use 'error' or 'skip'.")
    seen: dict[int, str] = {}
    for record in records:
        tally.records += 1
        try:
            value = record.parse()
            rows = to_rows(value, record.source)
            # Last, because an id that a bad row had is free for the row that mends it.
            _check_id(value, record.source, seen)
        except BadRow as bad:
            if on_bad_row == "error":
                raise InputError(f"{record.where} {bad}: mend it or pass {flag}=skip.") from None
            tally.skipped.append((record.source, str(bad)))
            continue
        tally.kept += len(rows)
        tally.tied += sum(_is_tied(row) for row in rows)
        yield from rows
    if not tally.kept:
        why = "no rows"
        if tally.skipped:
            first = tally.skipped[0][1]
            why = f"no usable row (all {len(tally.skipped)} were skipped, the first because it {first})"
        raise InputError(f"{name} has {why}: give a file with at least one.")
    if tally.tied == tally.kept:
        raise InputError(
            f"{name} has all votes tied in every one of its {tally.kept} rows, so that nothing is preferred: give "
            "rows with a majority, or leave the votes out."
        )


def _check_id(value: Any, source: str, seen: dict[int, str]) -> None:
    """Refuses an ``id`` that an earlier record had; eight bytes of a digest stand for each."""
    if not isinstance(value, dict) or not isinstance(value.get("id"), str | int):
        return
    digest = hashlib.blake2b(repr(value["id"]).encode("utf-8", "backslashreplace"), digest_size=8).digest()
    first = seen.setdefault(int.from_bytes(digest, "big"), source)
    if first != source:
        raise BadRow(f"has the id {str(value['id'])[:60]!r} that {first} has already")


def _is_tied(row: AnyRow) -> bool:
    return isinstance(row, Preference) and row.votes is not None and row.votes[0] == row.votes[1]


def split_by_group(
    rows: Sequence[Row], *, held_out_fraction: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows), each in the order given; no group (see `rows.group_of`) is divided.

    See `is_held_out`; a file and the set prepared from it hold out the same rows.
    """
    return _divide(rows, digests([group_of(row) for row in rows]), held_out_fraction, seed)


def split_by_row(rows: Sequence[Row], *, held_out_fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """As `split_by_group`, with each row a group of its own: only to show what such a split would leak."""
    return _divide(rows, np.arange(len(rows), dtype=np.uint64), held_out_fraction, seed)


def _divide(
    rows: Sequence[Row], groups: np.ndarray, held_out_fraction: float, seed: int
) -> tuple[list[Row], list[Row]]:
    held_out = is_held_out(groups, held_out_fraction=held_out_fraction, seed=seed).tolist()
    train = [row for row, out in zip(rows, held_out, strict=True) if not out]
    return train, [row for row, out in zip(rows, held_out, strict=True) if out]


def is_held_out(groups: np.ndarray, *, held_out_fraction: float, seed: int) -> np.ndarray:
    """Which rows are held out, [N] bool; ``groups`` [N] uint64 is equal for rows of one group (see `digests`).

    The seed and its name alone give each group a place in line, and groups are held out from the front until at least
    ``held_out_fraction`` of the rows are; one group always remains for training. So neither the order of rows nor where
    they are read from matters, and rows that are added move few groups.

    Raises:
      InputError: the fraction is not in [0, 1), or there is one group only.
    """
    if not 0.0 <= held_out_fraction < 1.0:
        raise InputError(f"held_out_fraction is {held_out_fraction}: give at least 0 and below 1.")
    if held_out_fraction == 0.0:
        return np.zeros(len(groups), bool)
    names, group_of_row, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise InputError(
            f"the {len(groups)} rows form {len(names)} group(s), of which none can be held out: give rows "
            "of at least two groups, or a held-out fraction of 0."
        )
    line = np.argsort(_scramble(names ^ digests([f"split {seed}"])[0]), kind="stable")
    rows_before = np.cumsum(sizes[line]) - sizes[line]
    chosen = rows_before < held_out_fraction * len(groups)
    chosen[-1] = False
    held_out = np.zeros(len(names), bool)
    held_out[line] = chosen
    return held_out[group_of_row]


def digests(texts: Iterable[str]) -> np.ndarray:
    """Eight bytes of the BLAKE2b of each text, [N] uint64: the same everywhere and for ever."""
    found = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(found), "<u8").astype(np.uint64)


def _scramble(numbers: np.ndarray) -> np.ndarray:
    """A one-to-one function of uint64 without pattern (the finaliser of SplitMix64; Steele et al. 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def longer_wins(rows: Sequence[Preference]) -> float:
    """The accuracy of "the longer response, in characters, is the better one"; a tie counts one half."""
    if not rows:
        raise InputError("longer_wins was asked about no rows: give at least one preference pair.")
    points = (0.5 + 0.5 * _sign(len(row.chosen) - len(row.rejected)) for row in rows)
    return sum(points) / len(rows)


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)
