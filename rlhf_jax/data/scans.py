"""What a tokenizer makes of every row of a prepared set: which rows fit, and how long they are; imports prepared.

A set is scanned once for a tokenizer and widths; what was found is kept in the set's directory (``scan-*``), so that
from then on a stage starts at once. Only lengths are kept in memory, eight bytes a row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging

from rlhf_jax.data.prepared import PreparedRows

_CHUNK = 1024
# To be raised whenever other rows fit, or fit otherwise, than before: scans of an older number are made again.
_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scan:
    """kept: [N] bool. lengths: [N, 2] int32, ids of prompt and response, 0 where not kept.

    dropped, truncated: (row number, source, reason) of each such row, in order.
    """

    kept: np.ndarray
    lengths: np.ndarray
    dropped: tuple[tuple[int, str, str], ...]
    truncated: tuple[tuple[int, str, str], ...]


# Rows -> ((place, prompt ids, response ids) of each that is kept, (source, reason) of those dropped, and truncated).
Measure = Callable[[Sequence[Any]], tuple[list[tuple[int, int, int]], Sequence, Sequence]]
# Called with how many rows have been looked at, and how many there are.
Progress = Callable[[int, int], None]


def unseen(rows: int, total: int) -> None:
    """Progress that nobody looks at."""


def scan(rows: PreparedRows, measure: Measure, identity: str, progress: Progress = unseen) -> Scan:
    """What ``measure`` says of every row of the set that ``rows`` are some of.

    Args:
      rows: gives the set, and the view of its rows.
      measure: see `Measure`.
      identity: names everything besides the rows that decides what ``measure`` says.
      progress: is called before the first row, and as rows are measured; not where that was done before.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, rows.view, identity]).encode()).hexdigest()[:16]
    path = rows.directory / f"scan-{digest}"
    found = _load(path, len(rows.source))
    if found is None:
        found = _scan(rows, measure, progress)
        _save(path, found)
    return found


def _scan(rows: PreparedRows, measure: Measure, progress: Progress) -> Scan:
    everything = dataclasses.replace(rows, indices=np.arange(len(rows.source), dtype=np.int64))
    kept, lengths = np.zeros(len(everything), bool), np.zeros((len(everything), 2), np.int32)
    dropped, truncated = [], []
    for start in range(0, len(everything), _CHUNK):
        progress(start, len(everything))
        chunk = everything.fetch(np.arange(start, min(start + _CHUNK, len(everything))))
        fitted, left_out, cut = measure(chunk)
        for place, prompt, response in fitted:
            kept[start + place], lengths[start + place] = True, (prompt, response)
        if left_out or cut:
            places = {row.source: start + place for place, row in enumerate(chunk)}
            dropped += [(places[source], source, reason) for source, reason in left_out]
            truncated += [(places[source], source, reason) for source, reason in cut]
    progress(len(everything), len(everything))
    return Scan(kept=kept, lengths=lengths, dropped=tuple(dropped), truncated=tuple(truncated))


def _load(path: pathlib.Path, count: int) -> Scan | None:
    try:
        with (
            path.with_suffix(".npz").open("rb") as stream,
            np.load(stream, allow_pickle=False) as arrays,
        ):
            kept, lengths = arrays["kept"], arrays["lengths"]
        lists = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        dropped, truncated = (
            tuple((int(number), source, reason) for number, source, reason in lists[name])
            for name in ("dropped", "truncated")
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        logging.warning("%s cannot be read (%s); the set is scanned again", path, error)
        return None
    if kept.shape != (count,) or lengths.shape != (count, 2):
        return None
    return Scan(kept=kept, lengths=lengths, dropped=dropped, truncated=truncated)


def _save(path: pathlib.Path, found: Scan) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            np.savez(stream, kept=found.kept, lengths=found.lengths)
        lists = {"dropped": found.dropped, "truncated": found.truncated}
        partial_lists = partial.with_suffix(".lists")
        partial_lists.write_text(json.dumps(lists), encoding="utf-8")
        os.replace(partial_lists, path.with_suffix(".json"))
        os.replace(partial, path.with_suffix(".npz"))
    except OSError as error:
        logging.warning("%s cannot be written (%s); the set will be scanned again", path, error)
