"""Several sequences of rows as one, each drawn as often as its weight says; imports pipeline and errors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.pipeline import Source
from rlhf_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Mixture(Sequence):
    """The rows of ``parts``, one part after the other; ``weights`` has one positive number a part.

    Raises:
      InputError: not one weight for each part, or one that is not positive.
    """

    parts: tuple[Sequence, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.parts) != len(self.weights):
            raise InputError(
                f"{len(self.parts)} sources have {len(self.weights)} weights: give one weight for each."
            )
        bad = [weight for weight in self.weights if not (0 < weight < math.inf)]
        if bad:
            raise InputError(f"a source has the weight {bad[0]}: give a positive number.")

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        part, inner = self._find(range(len(self))[place])
        return self.parts[part][inner]

    def fetch(self, places: np.ndarray) -> list[Any]:
        """The rows at some places; those of one part are read together."""
        found = [self._find(int(place)) for place in places]
        rows: list[Any] = [None] * len(found)
        for number, part in enumerate(self.parts):
            of_part = [i for i, (where, _) in enumerate(found) if where == number]
            inner = np.array([found[i][1] for i in of_part], np.int64)
            for i, row in zip(of_part, fetch(part, inner), strict=True):
                rows[i] = row
        return rows

    def _find(self, place: int) -> tuple[int, int]:
        """(part, place in it)."""
        starts = [source.start for source in self.sources()]
        part = int(np.searchsorted(starts, place, side="right")) - 1
        return part, place - starts[part]

    def sources(self) -> tuple[Source, ...]:
        """Where each part begins and ends."""
        sizes = [len(part) for part in self.parts]
        return tuple(
            Source(start=sum(sizes[:i]), count=size, weight=weight)
            for i, (size, weight) in enumerate(zip(sizes, self.weights, strict=True))
        )

    def map(self, function: Callable[[Sequence], Sequence]) -> Mixture:
        """Another sequence in the place of each part."""
        return dataclasses.replace(self, parts=tuple(function(part) for part in self.parts))


def in_turn(rows: Sequence, count: int) -> list[Any]:
    """The first ``count`` rows, in memory; those of a mixture from each of its parts in turn, until it has no more."""
    if not isinstance(rows, Mixture):
        return fetch(rows, np.arange(min(count, len(rows))))
    places = [(place, part) for part, own in enumerate(rows.parts) for place in range(min(count, len(own)))]
    starts = [source.start for source in rows.sources()]
    return rows.fetch(np.array([starts[part] + place for place, part in sorted(places)[:count]], np.int64))


def fetch(rows: Sequence, places: np.ndarray) -> list[Any]:
    """The rows at some places [M] int, read together where the sequence can do that."""
    if hasattr(rows, "fetch"):
        return rows.fetch(places) if len(places) else []
    return [rows[int(place)] for place in places]
