"""What preference rows say before anything is trained on them: length bias, contradictions, agreement, the ceiling.

Imports NumPy, SciPy, data and errors. Everything is a pure function of rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import sparse, special

from rlhf_jax.data.rows import Preference, group_of, label_of
from rlhf_jax.errors import InputError

# The longer response is up to 10%, up to half as long again, up to twice, up to four times as long, or longer.
RATIO_BOUNDS = (1.1, 1.5, 2.0, 4.0)
# Concentrations s of the Beta(s, s) that annotators' opinions are fitted with; beyond either end nothing changes.
_CONCENTRATIONS = np.geomspace(0.01, 100.0, 801)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """Characters of each row's prompt, chosen and rejected response: [N] int64 each."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


def lengths(rows: Sequence[Preference]) -> Lengths:
    """Lengths in characters, row by row.

    Raises:
      InputError: no rows.
    """
    if not rows:
        raise InputError("statistics were asked of no rows: give at least one preference pair.")
    return Lengths(
        prompt=np.array([len(row.prompt) for row in rows]),
        chosen=np.array([len(row.chosen) for row in rows]),
        rejected=np.array([len(row.rejected) for row in rows]),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthBin:
    """Pairs whose longer response is above ``low`` and at most ``high`` times as long as the other.

    longer_wins: share of the ``count`` pairs in which the longer one was chosen; a tie counts one half.
    """

    low: float
    high: float
    count: int
    longer_wins: float


def length_bias(found: Lengths) -> list[LengthBin]:
    """How often the longer response wins, by how much longer it is; bins without pairs are left out."""
    won = (1 + np.sign(found.chosen - found.rejected)) / 2
    ratio = np.maximum(found.chosen, found.rejected) / np.maximum(np.minimum(found.chosen, found.rejected), 1)
    place = np.searchsorted(RATIO_BOUNDS, ratio)
    bounds = (1.0, *RATIO_BOUNDS, float("inf"))
    return [
        LengthBin(
            low=bounds[number],
            high=bounds[number + 1],
            count=int(inside.sum()),
            longer_wins=float(won[inside].mean()),
        )
        for number in range(len(bounds) - 1)
        if (inside := place == number).any()
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labels:
    """What the labels by one of several objectives are like.

    objective: its name. judged: pairs that have its label. tied: those of them that it says are equal. with_chosen,
    longer_wins: of the others, the share on whose chosen side it is, and the share that the longer response wins.
    """

    objective: str
    judged: int
    tied: int
    with_chosen: float
    longer_wins: float


def labels(rows: Sequence[Preference]) -> list[Labels]:
    """Of each objective that rows are judged by, in the order in which they come; none where there is one label."""
    found = []
    for objective in dict.fromkeys(name for row in rows for name, _ in row.labels):
        judged = [(row, label) for row in rows if (label := label_of(row, objective)) is not None]
        sides = [(row, np.sign(label - 0.5)) for row, label in judged if label != 0.5]
        longer = [side * np.sign(len(row.chosen) - len(row.rejected)) for row, side in sides]
        found.append(
            Labels(
                objective=objective,
                judged=len(judged),
                tied=len(judged) - len(sides),
                with_chosen=float(np.mean([side > 0 for _, side in sides])) if sides else 0.5,
                longer_wins=float(np.mean((1 + np.array(longer)) / 2)) if sides else 0.5,
            )
        )
    return found


@dataclasses.dataclass
class Tally:
    """Everything said of two responses to one prompt, in the order of their texts.

    labels: how many rows chose the former, the latter. votes: annotators for the former, the latter, for neither; a
    row without votes is one annotator. sources: where the rows came from.
    """

    labels: list[int] = dataclasses.field(default_factory=lambda: [0, 0])
    votes: list[int] = dataclasses.field(default_factory=lambda: [0, 0, 0])
    sources: list[str] = dataclasses.field(default_factory=list)


Pair = tuple[str, str, str]


def tallies(rows: Sequence[Preference]) -> dict[Pair, Tally]:
    """(prompt, response, response) -> what all rows together say of it; the responses are sorted."""
    found: dict[Pair, Tally] = {}
    for row in rows:
        turned = row.chosen > row.rejected
        first, second = sorted((row.chosen, row.rejected))
        tally = found.setdefault((row.prompt, first, second), Tally())
        won, lost, neither = row.votes or (1, 0, 0)
        tally.labels[turned] += 1
        for place, count in enumerate((lost, won, neither) if turned else (won, lost, neither)):
            tally.votes[place] += count
        tally.sources.append(row.source)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Consistency:
    """Whether one reward for each response can agree with all labels.

    pairs: different (prompt, two responses). repeated: how many rows say again what was asked before.
    contradicted: sources of the rows of each pair that was labelled both ways. cyclic_pairs: pairs that lie on a cycle
    a > b > ... > a of majorities. cyclic_prompts: prompts that have one. reachable: no scalar reward agrees with a
    larger share of the labels (an upper bound: the minority of each contradicted pair, and one label a cycle, is lost).
    """

    pairs: int
    repeated: int
    contradicted: tuple[tuple[str, ...], ...]
    cyclic_pairs: int
    cyclic_prompts: int
    reachable: float


def consistency(found: Mapping[Pair, Tally]) -> Consistency:
    """Contradictions, and cycles as the strongly connected components of "was preferred to" within a prompt."""
    labels = sum(sum(tally.labels) for tally in found.values())
    contradicted = tuple(tuple(tally.sources) for tally in found.values() if all(tally.labels))
    lost = sum(min(tally.labels) for tally in found.values())
    places: dict[tuple[str, str], int] = {}
    winners, losers, prompts = [], [], []
    for (prompt, *sides), tally in found.items():
        nodes = [places.setdefault((prompt, side), len(places)) for side in sides]
        if tally.labels[0] != tally.labels[1]:
            turned = tally.labels[0] < tally.labels[1]
            winners.append(nodes[turned])
            losers.append(nodes[not turned])
            prompts.append(prompt)
    graph = sparse.csr_array((np.ones(len(winners)), (winners, losers)), shape=(len(places),) * 2)
    _, component = sparse.csgraph.connected_components(graph, connection="strong")
    cyclic = [
        (component[winner], prompt)
        for winner, loser, prompt in zip(winners, losers, prompts, strict=True)
        if component[winner] == component[loser]
    ]
    lost += len({number for number, _ in cyclic})
    return Consistency(
        pairs=len(found),
        repeated=labels - len(found),
        contradicted=contradicted,
        cyclic_pairs=len(cyclic),
        cyclic_prompts=len({prompt for _, prompt in cyclic}),
        reachable=1.0 - lost / labels,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far annotators agree, and what that leaves for a reward model to reach.

    pairs: pairs with two votes or more, all that is known comes from them. two_agree: the chance that two annotators of
    a pair who are both for one side are for the same one. single_bounds: within these lies, whatever opinions are like,
    the share of single annotators' votes that the best reward model agrees with. single: that share, if each
    pair's probability is drawn from Beta(concentration, concentration), fitted to the votes. labels: the share of the
    labels, which majorities decided, that it agrees with then. neither: share of votes for neither side.
    """

    pairs: int
    two_agree: float
    single_bounds: tuple[float, float]
    concentration: float
    single: float
    labels: float
    neither: float


def agreement(found: Mapping[Pair, Tally]) -> Agreement | None:
    """Agreement over the pairs that several annotators judged; None where there is no such pair.

    With p a pair's probability, two annotators agree with probability a = E[p^2 + (1-p)^2], and the best model agrees
    with one of them with c = E[max(p, 1-p)] = (1 + E|2p-1|) / 2. As a = (1 + E(2p-1)^2) / 2 and E x^2 <= E|x| <=
    sqrt(E x^2) for |x| <= 1, c lies between a and (1 + sqrt(2a-1)) / 2.
    """
    votes = np.array([tally.votes for tally in found.values()], np.int64).reshape(-1, 3)
    first, second = votes[:, 0], votes[:, 1]
    several = first + second >= 2
    if not several.any():
        return None
    a, b = first[several].astype(float), second[several].astype(float)
    two_agree = float(np.mean((a * (a - 1) + b * (b - 1)) / ((a + b) * (a + b - 1))))
    shape = _concentration(first, second)
    labels = np.array([tally.labels for tally in found.values()], np.float64)
    # P(the first is the better one | votes); its complement is the chance for labels that chose the second.
    better = 1.0 - special.betainc(first + shape, second + shape, 0.5)
    return Agreement(
        pairs=int(several.sum()),
        two_agree=two_agree,
        single_bounds=(max(two_agree, 0.5), (1 + max(2 * two_agree - 1, 0.0) ** 0.5) / 2),
        concentration=shape,
        single=float(1.0 - special.betainc(shape + 1, shape, 0.5)),
        labels=float((labels[:, 0] @ better + labels[:, 1] @ (1 - better)) / labels.sum()),
        neither=float(votes[:, 2].sum() / votes.sum()),
    )


def _concentration(first: np.ndarray, second: np.ndarray) -> float:
    """The s that makes the votes likeliest, under p ~ Beta(s, s) for each pair and votes ~ Binomial(n, p)."""
    kinds, counts = np.unique(np.stack([first, second]), axis=1, return_counts=True)
    shapes = _CONCENTRATIONS[:, None]
    likelihood = special.betaln(kinds[0] + shapes, kinds[1] + shapes) - special.betaln(shapes, shapes)
    return float(_CONCENTRATIONS[np.argmax(likelihood @ counts)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leakage:
    """How many of the ``rows`` of one split share what with any row of another."""

    rows: int
    prompts: int
    groups: int
    responses: int
    pairs: int


def leakage(train: Sequence[Preference], other: Sequence[Preference]) -> Leakage:
    """What ``other`` shares with ``train``: a prompt, a group, a response, the same pair either way round."""
    prompts = {row.prompt for row in train}
    groups = {group_of(row) for row in train}
    responses = {text for row in train for text in (row.chosen, row.rejected)}
    pairs = {(row.prompt, frozenset((row.chosen, row.rejected))) for row in train}
    return Leakage(
        rows=len(other),
        prompts=sum(row.prompt in prompts for row in other),
        groups=sum(group_of(row) in groups for row in other),
        responses=sum(row.chosen in responses or row.rejected in responses for row in other),
        pairs=sum((row.prompt, frozenset((row.chosen, row.rejected))) in pairs for row in other),
    )
