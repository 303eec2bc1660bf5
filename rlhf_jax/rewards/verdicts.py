"""What a verifier decided, and why; imports numpy only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The reward of one completion, in [0, 1], and one sentence that says how it came about."""

    reward: float
    reason: str


def rewards_of(verdicts: Sequence[Verdict]) -> np.ndarray:
    """[B] float32: the rewards alone."""
    return np.array([verdict.reward for verdict in verdicts], np.float32)


def check_pairing(name: str, completions: Sequence[object], others: Sequence[object]) -> None:
    """Raises ValueError unless there is one entry of ``others`` for each completion.

    A lone string is refused as well: it is a sequence of one-letter strings, and never meant as one.
    """
    for what, values in (("completions", completions), (name, others)):
        if isinstance(values, str | bytes):
            raise ValueError(f"{what} is one text; give a list of texts, one a row")
    if len(completions) != len(others):
        raise ValueError(
            f"{len(completions)} completions and {len(others)} {name} were given; give one of each for every row"
        )
