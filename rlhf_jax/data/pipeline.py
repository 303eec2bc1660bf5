"""The order in which rows are seen, and an iterator over batches that can be resumed; imports errors and grain only.

Everything is a function of the number of a batch: which rows it has, in which order, and which of them a process
reads. So the state of an iterator is one number, the same on every process, with any number of workers; a run that goes
on with another number of processes reads exactly the rows that it would have read.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from rlhf_jax.errors import InputError

# Endless for every purpose; Grain's own "endless" overflows an index when batches hold one row.
_EPOCHS = 2**31
# Batches that a worker has ready.
_READY = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Rows ``start`` to ``start + count`` of the whole, drawn with a relative weight."""

    start: int
    count: int
    weight: float = 1.0


def row_order(sources: Sequence[Source], seed: int) -> grain.MapDataset:
    """Endless row numbers: each source reshuffled every epoch of its own, and drawn in proportion to its weight."""
    ordered = [
        grain.MapDataset.range(source.start, source.start + source.count).seed(own).shuffle().repeat(_EPOCHS)
        for source, own in zip(sources, _seeds(seed, len(sources)), strict=True)
    ]
    if len(ordered) == 1:
        return ordered[0]
    return grain.MapDataset.mix(ordered, weights=[source.weight for source in sources])


def batch_order(groups: Sequence[np.ndarray], batch_size: int, seed: int) -> grain.MapDataset:
    """Endless batches of row numbers [B], each of one group; groups take turns in proportion to their sizes.

    Every row of a group is seen once before any is seen again.
    """
    weights = [len(group) for group in groups]
    ordered = [
        row_order([Source(start=0, count=len(group))], own)
        .batch(batch_size)
        .map(functools.partial(_members, group))
        for group, own in zip(groups, _seeds(seed, len(groups)), strict=True)
    ]
    return ordered[0] if len(ordered) == 1 else grain.MapDataset.mix(ordered, weights=weights)


def _members(group: np.ndarray, places: np.ndarray) -> np.ndarray:
    return group[places]


def _seeds(seed: int, count: int) -> list[int]:
    """One for each source; the seed itself for the first."""
    return [seed, *np.random.SeedSequence(seed).generate_state(count - 1).tolist()] if count > 1 else [seed]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of every batch this process reads, and how many worker processes read it ahead (0: none)."""

    process_index: int = 0
    process_count: int = 1
    num_workers: int = 0

    def of(self, rows: np.ndarray) -> np.ndarray:
        """This process's part of the rows [B] of a batch: [B / process_count], in order."""
        return np.split(rows, self.process_count)[self.process_index]

    def check(self, batch_size: int) -> None:
        """Refuses a batch that cannot be shared out evenly.

        Raises:
          InputError: names both numbers.
        """
        if batch_size % self.process_count:
            raise InputError(
                f"a batch of {batch_size} rows cannot be shared evenly by {self.process_count} processes: give a "
                "batch size that they divide."
            )
        if self.num_workers < 0:
            raise InputError(f"the number of workers is {self.num_workers}: give 0 or more.")


class BatchIterator(grain.DatasetIterator):
    """Endless batches, one after the other, from any batch on.

    A Grain iterator, so that it stands wherever one of Grain's own does.
    """

    def __init__(
        self, dataset: grain.MapDataset, *, identity: str, sources: grain.MapDataset, num_workers: int = 0
    ):
        """Begins with the first batch.

        Args:
          dataset: from the number of a batch to the batch.
          identity: what decides which batch has which number; a state of another is refused.
          sources: from the number of a batch to where its rows came from, those of all processes.
          num_workers: processes that make batches ahead of time.
        """
        super().__init__()
        self._dataset = dataset
        self._identity = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._sources = sources
        self._num_workers = num_workers
        self._next = 0
        self._ahead: grain.DatasetIterator | None = None

    def __next__(self) -> Any:
        self._assert_not_closed()
        if self._ahead is None:
            if self._num_workers:
                # Workers take seconds to start; the batch before their first is made here meanwhile.
                self._start_workers(self._next + 1)
            batch = self._dataset[self._next]
        else:
            batch = next(self._ahead)
        self._next += 1
        return batch

    def _start_workers(self, first: int) -> None:
        """Has workers make batches from the one with the number ``first`` on; returns before they have begun."""
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read flags, which only a program under absl has parsed
        rest = self._dataset.slice(slice(first, None)).to_iter_dataset(
            grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        )
        options = grain.MultiprocessingOptions(num_workers=self._num_workers, per_worker_buffer_size=_READY)
        self._ahead = iter(rest.mp_prefetch(options, worker_init_fn=_begin_worker))
        self._ahead.start_prefetch()

    def sources_of(self, number: int) -> list[str]:
        """Where the rows of a batch (from 0) came from, those of all processes."""
        return self._sources[number]

    def get_state(self) -> dict[str, Any]:
        """The number of the next batch, and what numbers mean."""
        return {"next_batch": self._next, "order": self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where ``state`` was taken.

        Raises:
          InputError: it is of another order: other rows, seed, batch size, weights or layout.
        """
        if state.get("order") != self._identity:
            raise InputError(
                f"the saved position in the data is of another order of batches ({state.get('order')}, here "
                f"{self._identity}): go on with the data, seed and batch size that the run was started with."
            )
        self._stop_workers()
        self._next = int(state["next_batch"])

    def start_prefetch(self) -> None:
        """Has workers begin; batches are made when asked for where there are none."""
        if self._num_workers and self._ahead is None:
            self._start_workers(self._next)

    def close(self) -> None:
        """Ends the workers."""
        self._stop_workers()
        super().close()

    def _stop_workers(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None


def _begin_worker(index: int, count: int) -> None:
    """Has a worker live exactly as long as it is of use.

    A Ctrl-C reaches every process of a terminal, and the run needs its workers to finish its step; a run that was
    killed outright can tell nobody.
    """
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def batches(
    order: grain.MapDataset,
    make_batch: Callable[[np.ndarray], Any],
    share: Share,
    *,
    identity: str,
    sources_of: Callable[[np.ndarray], list[str]],
) -> BatchIterator:
    """An iterator over what ``make_batch`` makes of each batch's row numbers, of which a process reads its share."""
    made = order.map(share.of).map(make_batch)
    return BatchIterator(
        made, identity=identity, sources=order.map(sources_of), num_workers=share.num_workers
    )
