"""Beam search whose unit is a step and whose judge is a score of what is written so far; imports errors only.

Snell et al. (2024, section 5.1): draw some continuations of one step, keep the best by a process reward model, go on
from each of those. It decides after every step what best-of-n decides at the end, from as many draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from rlhf_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A response, or the beginning of one. response: ids. score: of all of it. ended: whether there is no more."""

    response: tuple[int, ...]
    score: float
    ended: bool


# (number of the prompt, ids of the response so far)
Place = tuple[int, tuple[int, ...]]
# (places, number of the round) -> the ids of one more step of each, and whether the response ends with it.
Extend = Callable[[Sequence[Place], int], Sequence[tuple[Sequence[int], bool]]]
Score = Callable[[Sequence[Place]], Sequence[float]]


def step_beam(
    num_prompts: int, extend: Extend, score: Score, *, width: int, expansions: int, max_steps: int
) -> list[Candidate]:
    """The best response to each prompt that the search finds.

    A round draws ``expansions`` continuations of each of the ``width`` beginnings of a prompt that have not ended (in
    the first round ``width * expansions`` of nothing), and keeps the ``width`` distinct ones with the highest scores,
    those that ended before among them; of equals the one that was found first. The search ends when all have ended.

    Args:
      num_prompts: how many; they are named by their numbers.
      extend: draws; it is called with the beginnings of all prompts at once.
      score: judges, the higher the better.
      width: beginnings kept for a prompt.
      expansions: continuations of each.
      max_steps: rounds at most; after them what has not ended is worse than whatever has.

    Raises:
      InputError: a number below 1.
    """
    for name, value in (("width", width), ("expansions", expansions), ("max_steps", max_steps)):
        if value < 1:
            raise InputError(f"{name} of the beam is {value}: give at least 1")
    nothing = Candidate(response=(), score=0.0, ended=False)
    beams = [[nothing] for _ in range(num_prompts)]
    for number in range(max_steps):
        repeats = width * expansions if number == 0 else expansions
        places = [
            (prompt, kept.response)
            for prompt, beam in enumerate(beams)
            for kept in beam
            if not kept.ended
            for _ in range(repeats)
        ]
        if not places:
            break
        drawn = extend(places, number)
        longer = [(prompt, (*said, *more)) for (prompt, said), (more, _) in zip(places, drawn, strict=True)]
        found: list[list[Candidate]] = [[kept for kept in beam if kept.ended] for beam in beams]
        for (prompt, said), value, (_, ended) in zip(longer, score(longer), drawn, strict=True):
            found[prompt].append(Candidate(response=said, score=float(value), ended=ended))
        beams = [_best(candidates, width) for candidates in found]
    return [max(beam, key=lambda kept: (kept.ended, kept.score)) for beam in beams]


def _best(candidates: Sequence[Candidate], width: int) -> list[Candidate]:
    """The ``width`` distinct responses with the highest scores, the first found where they tie."""
    first = {kept.response: kept for kept in reversed(candidates)}
    distinct = [kept for kept in candidates if first.get(kept.response) is kept]
    return sorted(distinct, key=lambda kept: -kept.score)[:width]
