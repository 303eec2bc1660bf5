"""Typed metrics that merge exactly, and the files they are written to. Imports masking, errors, storage.

A metric is a ``WeightedSum`` (reported as total / weight), a ``Maximum`` or a ``Total``. Metrics of
micro-batches, devices and steps merge by adding totals and weights, never by averaging averages, so a reported
mean does not depend on how the work was split. Merging over steps happens on the host in float64, in step order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
import tempfile
import time
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import storage
from rlhf_jax.errors import InputError
from rlhf_jax.masking import WeightedSum
from rlhf_jax.storage import Path


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Maximum:
    """A metric of which the largest value counts. ``value``: [] float32."""

    value: jax.Array

    def __add__(self, other: Maximum) -> Maximum:
        return Maximum(jnp.maximum(self.value, other.value))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Total:
    """A metric that is summed, not averaged: a count over whatever was merged. ``value``: [] float32."""

    value: jax.Array

    def __add__(self, other: Total) -> Total:
        return Total(self.value + other.value)


Metric = WeightedSum | Maximum | Total
Metrics = Mapping[str, Metric]


def mean_of(values) -> WeightedSum:
    """The metric whose report is the mean of ``values`` (any shape, any float dtype)."""
    values = jnp.asarray(values, jnp.float32)
    return WeightedSum(values.sum(), jnp.float32(values.size))


def mean_over_rows(values, mask) -> WeightedSum:
    """The mean of ``values`` [B] over the rows in which ``mask`` [B, R] is True somewhere: those that say anything."""
    counts = jnp.asarray(mask).any(axis=1)
    values = jnp.where(counts, jnp.asarray(values, jnp.float32), 0.0)
    return WeightedSum(values.sum(), counts.sum().astype(jnp.float32))


def count(mask) -> Total:
    """The metric that counts the True entries of ``mask`` (any shape)."""
    return Total(jnp.asarray(mask).sum().astype(jnp.float32))


def merge(first: Metrics, second: Metrics) -> dict[str, Metric]:
    """Merges two sets of metrics name by name; inside or outside of ``jit``."""
    merged = dict(first)
    for name, metric in second.items():
        merged[name] = merged[name] + metric if name in merged else metric
    return merged


def merge_over_axis(metrics: Metrics, axis_name: str) -> dict[str, Metric]:
    """Merges metrics over a mapped device axis (``pmap``, ``shard_map``)."""

    def over_axis(metric):
        reduce = jax.lax.pmax if isinstance(metric, Maximum) else jax.lax.psum
        return jax.tree.map(lambda x: reduce(x, axis_name), metric)

    return {name: over_axis(metric) for name, metric in metrics.items()}


@dataclasses.dataclass
class Accumulator:
    """Host-side running totals between two written rows, in float64; ``to_json`` and back is exact."""

    sums: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    maxima: dict[str, float] = dataclasses.field(default_factory=dict)
    totals: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, metrics: Metrics) -> None:
        for name, metric in jax.device_get(dict(metrics)).items():
            if isinstance(metric, Maximum):
                # np.maximum and not max, which would hide a NaN.
                self.maxima[name] = float(np.maximum(self.maxima.get(name, -np.inf), metric.value))
            elif isinstance(metric, Total):
                self.totals[name] = self.totals.get(name, 0.0) + float(metric.value)
            else:
                total, weight = self.sums.get(name, (0.0, 0.0))
                self.sums[name] = [total + float(metric.total), weight + float(metric.weight)]

    def values(self) -> dict[str, float]:
        """The reported number of every metric; a mean over nothing is 0."""
        means = {name: (total / weight if weight else 0.0) for name, (total, weight) in self.sums.items()}
        return means | self.maxima | self.totals

    def to_json(self) -> dict:
        return {"sums": self.sums, "maxima": self.maxima, "totals": self.totals}

    @classmethod
    def from_json(cls, saved: Mapping) -> Accumulator:
        sums = {name: list(sum_and_weight) for name, sum_and_weight in saved["sums"].items()}
        return cls(sums=sums, maxima=dict(saved["maxima"]), totals=dict(saved["totals"]))


class MetricsWriter:
    """Appends rows ``{"step": int, name: float, ...}`` to ``metrics.jsonl`` and to TensorBoard events.

    Opened at ``start_step``: rows of later steps, written by a run that was killed after its last checkpoint, are
    dropped first, so that the file of a resumed run equals that of an undisturbed one. On a disk a row is there once it
    is written. Nothing can be appended to an object of a bucket: there the files grow in a temporary directory of this
    machine, and are uploaded whole by ``flush`` (for whoever saves what goes on from these rows), with the first row,
    with the first one after a minute without an upload, and at the end.

    Raises:
      InputError: here and in every method, where the disk or bucket does not take what is written.
    """

    def __init__(self, directory: Path, *, start_step: int):
        # Imported here: TensorBoard's writer pulls in protobuf, which readers of metrics do not need.
        from tensorboardX import SummaryWriter

        self._path, self._cleanup = directory / "metrics.jsonl", None
        self._sent_at = -math.inf  # the first row is due at once: it says that the run goes
        with written(self._path):
            storage.make_directory(directory)
            kept = [row for row in read_metrics(self._path) if row["step"] <= start_step]
            self._local = directory
            if storage.in_bucket(directory):
                self._cleanup = tempfile.TemporaryDirectory(prefix="rlhf_jax_metrics")
                self._local = pathlib.Path(self._cleanup.name)
            storage.replace(self._local / self._path.name, "".join(json.dumps(row) + "\n" for row in kept))
            self._file = (self._local / self._path.name).open("a")
            self._events = SummaryWriter(str(self._local / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one row; ``values`` are finite or not, JSON spells NaN and Infinity as Python does."""
        with written(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        if time.monotonic() - self._sent_at > _SECONDS_UNSENT:
            self.flush()

    def flush(self) -> None:
        """Uploads what a bucket does not have yet; on a disk every row is there already."""
        if self._cleanup is None:
            return
        with written(self._path):
            self._events.flush()
            storage.upload(self._local, self._path.parent)
        self._sent_at = time.monotonic()

    def close(self) -> None:
        with written(self._path):
            try:
                self._file.close()  # which tries once more to write what the disk has refused
            finally:
                self._events.close()
        if self._cleanup is not None:
            self.flush()
            self._cleanup.cleanup()


# A row that is written this long after the last upload is uploaded, with those before it. The clock is looked at only
# there: a run that writes a row every ten minutes shows each at once, and nothing is uploaded between two rows.
_SECONDS_UNSENT = 60.0


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Within the block ``path`` is written; what the disk or bucket says to that is said in a sentence.

    Raises:
      InputError: the disk is full, or does not take it for another reason.
    """
    try:
        yield
    except Exception as error:
        problem = storage.problem(error)
        if problem is None:
            raise
        raise InputError(
            f"cannot write {path}: {problem}; what is saved is whole: make room or mend the disk, then "
            "run the same command again"
        ) from error


def read_metrics(path: Path) -> Iterator[dict]:
    """Yields the rows of a ``metrics.jsonl``; none if it does not exist. A torn last line ends the stream."""
    if not path.exists():
        return
    with path.open() as lines:
        for line in lines:
            if not line.endswith("\n"):
                return
            yield json.loads(line)
