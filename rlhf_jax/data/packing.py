"""Several short rows in one long one: which go together, and how they lie; imports types only, numpy alone.

Best-fit decreasing (Johnson et al. 1974): the longest row first, each into the bin that it fills best. What goes
together is decided once, from the lengths alone, and bins are shuffled every epoch; so bin i is found without the bins
before it, and an iterator over bins can be resumed anywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from rlhf_jax.types import DemonstrationBatch


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Bins:
    """rows: [N] int64, row numbers, those of one bin together. starts: [bins + 1] int64, where each bin begins."""

    rows: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def of(self, number: int) -> np.ndarray:
        """The rows of one bin."""
        return self.rows[self.starts[number] : self.starts[number + 1]]


def pack(lengths: np.ndarray, capacity: int, seed: int) -> Bins:
    """Puts rows of ``lengths`` [N] tokens into bins of ``capacity`` tokens; every row is in exactly one.

    The seed decides which of the rows of one length go where. Raises ValueError where a row is longer than a bin.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"a row has {int(lengths.max())} tokens, more than the {capacity} of a bin")
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    bin_of = np.empty(len(lengths), np.int64)
    # Open bins by the room that is left in them; bit r of ``open_rooms`` says whether there is one with room r.
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    open_rooms, count = 0, 0
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = open_rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                open_rooms ^= 1 << room
        else:
            room, number, count = capacity, count, count + 1
        left = room - length
        if left:
            by_room[left].append(number)
            open_rooms |= 1 << left
        bin_of[row] = number
    rows = np.argsort(bin_of, kind="stable")
    starts = np.searchsorted(bin_of[rows], np.arange(count + 1))
    return Bins(rows=rows, starts=starts)


def lay_out_packed(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], width: int, pad_id: int
) -> DemonstrationBatch:
    """One packed row, without the batch axis: each (prompt ids, response ids) after the one before it.

    tokens, token_mask, segment_ids: [S]; response_mask: [S - 1], as no token predicts the first column.
    """
    tokens, segments = np.full(width, pad_id, np.int32), np.zeros(width, np.int32)
    is_response = np.zeros(width, bool)
    start = 0
    for number, (prompt_ids, response_ids) in enumerate(rows, start=1):
        middle = start + len(prompt_ids)
        end = middle + len(response_ids)
        tokens[start:middle], tokens[middle:end] = prompt_ids, response_ids
        is_response[middle:end], segments[start:end] = True, number
        start = end
    return DemonstrationBatch(
        tokens=tokens, token_mask=segments > 0, response_mask=is_response[1:], segment_ids=segments
    )
