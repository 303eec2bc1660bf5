"""The rows that readers, prepared sets and the embedded worlds produce, before any tokenizer; imports nothing.

``source`` says where a row came from ("pairs.jsonl:7" or "world:preferences/12"); error messages quote it.

``group`` names what a row shares with others (a topic, a puzzle): rows of one group are never divided between training
and held-out rows; "" means that the prompt is the group.

``messages`` holds the turns of a conversational prompt as (role, content). ``prompt`` is then the same turns as plain
text, for people and for grouping; the tokenizer's chat template makes the text that is trained on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

Messages = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A prompt and one response worth imitating."""

    prompt: str
    response: str
    source: str
    group: str = ""
    messages: Messages = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference:
    """A prompt and two responses, of which ``chosen`` was preferred.

    probability: P(this label) where it is known (the embedded world), else None.
    chosen_gold, rejected_gold: gold reward of either side where it is known, else None; for analysis only.
    votes: how many annotators were for ``chosen``, for ``rejected``, and for neither; None where nobody counted.
    target: the probability of this label that a loss is to aim at (see `soft_label`); None where the label is hard.
    labels: where annotators judged by several objectives, of each that they judged its name and the probability that
    ``chosen`` is the better one by it. objectives: which of them a loss aims at, in its order; none: at the label.
    """

    prompt: str
    chosen: str
    rejected: str
    source: str
    group: str = ""
    probability: float | None = None
    chosen_gold: float | None = None
    rejected_gold: float | None = None
    votes: tuple[int, int, int] | None = None
    target: float | None = None
    messages: Messages = ()
    labels: tuple[tuple[str, float], ...] = ()
    objectives: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Annotators on two responses of a ranking, named by their places: votes for either, and for neither."""

    first: int
    second: int
    for_first: int
    for_second: int
    for_neither: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking:
    """A prompt and K >= 2 responses that annotators compared; at least one comparison is not a tie.

    targets: of each comparison the probability that the first is the better one, for a loss to aim at (see
    `soft_label`); None where labels are hard.
    """

    prompt: str
    responses: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    source: str
    group: str = ""
    messages: Messages = ()
    targets: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """Something to respond to; ``answer`` is what a verifier holds the response to, "" where there is none."""

    prompt: str
    source: str
    answer: str = ""
    group: str = ""
    messages: Messages = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessSteps:
    """A solution in steps; a label is P(the step is right), or None where nobody judged it."""

    prompt: str
    steps: tuple[str, ...]
    labels: tuple[float | None, ...]
    source: str
    answer: str = ""
    group: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unpaired:
    """A prompt, which may be empty, and one response that was found desirable or not."""

    prompt: str
    response: str
    desirable: bool
    source: str
    group: str = ""
    messages: Messages = ()


Row = Demonstration | Preference | Ranking | Prompt | ProcessSteps | Unpaired


def group_of(row: Row) -> str:
    """What must stay on one side of a split: the row's group, or else its prompt, or else its response.

    A row of neither, as a sentence with a sentiment, shares nothing but its own words.
    """
    return row.group or row.prompt or getattr(row, "response", "")


def ranks(row: Ranking) -> tuple[int, ...]:
    """Rank of each response, 0 the best, equal for ties: by comparisons won less comparisons lost (Copeland 1951)."""
    points = [0] * len(row.responses)
    for comparison in row.comparisons:
        won = _sign(comparison.for_first - comparison.for_second)
        points[comparison.first] += won
        points[comparison.second] -= won
    return tuple(sum(other > own for other in points) for own in points)


def pairs(row: Ranking) -> tuple[Preference, ...]:
    """Every comparison of a ranking that the votes decide, the winner as ``chosen``; ties make no pair."""
    found = []
    for comparison in row.comparisons:
        sides = [
            (comparison.for_first, row.responses[comparison.first]),
            (comparison.for_second, row.responses[comparison.second]),
        ]
        if comparison.for_first < comparison.for_second:
            sides.reverse()
        (won, chosen), (lost, rejected) = sides
        if won > lost and chosen != rejected:
            found.append(
                Preference(
                    prompt=row.prompt,
                    chosen=chosen,
                    rejected=rejected,
                    source=f"{row.source}/{comparison.first}-{comparison.second}",
                    group=row.group,
                    votes=(won, lost, comparison.for_neither),
                    messages=row.messages,
                )
            )
    return tuple(found)


def soft_label(row: Preference, *, prior: float = 0.0) -> float:
    """The target probability that ``chosen`` is the better one, for a Bradley-Terry loss with soft labels.

    ``probability`` where it is known; else from the votes, a vote for neither being half a vote for each side and
    ``prior`` votes added to both (1 is Laplace's rule); 1 where nobody voted, as the label is all there is.
    """
    if row.probability is not None:
        return row.probability
    if row.votes is None:
        return 1.0
    return _share(*row.votes, prior)


def _share(won: int, lost: int, neither: int, prior: float) -> float:
    return (won + neither / 2 + prior) / (won + lost + neither + 2 * prior)


def with_soft_label(row: Preference | Ranking, prior: float) -> Preference | Ranking:
    """The row, its ``target`` or ``targets`` set."""
    if isinstance(row, Ranking):
        of_each = (
            _share(said.for_first, said.for_second, said.for_neither, prior) for said in row.comparisons
        )
        return dataclasses.replace(row, targets=tuple(of_each))
    return dataclasses.replace(row, target=soft_label(row, prior=prior))


def with_objectives(row: Preference, names: tuple[str, ...]) -> Preference:
    """The row, its ``objectives`` set."""
    return dataclasses.replace(row, objectives=names)


def label_of(row: Preference, objective: str) -> float | None:
    """The probability that ``chosen`` is the better one by an objective; None where nobody judged."""
    return dict(row.labels).get(objective)


def swapped(row: Preference) -> Preference:
    """The same comparison with its sides exchanged, of a row whose label somebody else is to give."""
    return dataclasses.replace(
        row,
        chosen=row.rejected,
        rejected=row.chosen,
        chosen_gold=row.rejected_gold,
        rejected_gold=row.chosen_gold,
        probability=None,
        votes=None,
        target=None,
        labels=tuple((name, 1.0 - label) for name, label in row.labels),
    )


def plain_text(messages: Sequence[tuple[str, str]]) -> str:
    """Turns as text, ending where a response begins: "\\n\\nuser: ...\\n\\nassistant:"."""
    return "".join(f"\n\n{role}: {content}" for role, content in messages) + "\n\nassistant:"


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)
