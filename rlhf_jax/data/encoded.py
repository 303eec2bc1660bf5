"""Rows as ids, each with the row that it was made from, and how many ids that are; imports rows."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from rlhf_jax.data.rows import Demonstration, Preference, Prompt, Ranking

Side = tuple[tuple[int, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedDemonstration:
    """Ids of a demonstration, and the row that they were made from."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    row: Demonstration


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedPreference:
    """Ids of a pair; the prompt's ids may differ by the tokens at the boundary."""

    chosen_prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_prompt_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    row: Preference

    @property
    def sides(self) -> tuple[Side, Side]:
        """(prompt ids, response ids) of the chosen and of the rejected response."""
        return (self.chosen_prompt_ids, self.chosen_ids), (self.rejected_prompt_ids, self.rejected_ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedRanking:
    """(prompt ids, response ids) of each response of a ranking, and how many a row of a batch has room for."""

    sides: tuple[Side, ...]
    size: int
    row: Ranking


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """Ids of a prompt."""

    prompt_ids: tuple[int, ...]
    row: Prompt


EncodedRow = TypeVar("EncodedRow", EncodedDemonstration, EncodedPreference, EncodedRanking, EncodedPrompt)


def lengths_of_row(row: EncodedRow) -> tuple[int, int]:
    """Ids of prompt and response, those of the longest of several."""
    if isinstance(row, EncodedPreference | EncodedRanking):
        prompts, responses = zip(*row.sides, strict=True)
        return max(map(len, prompts)), max(map(len, responses))
    return len(row.prompt_ids), 0 if isinstance(row, EncodedPrompt) else len(row.response_ids)
