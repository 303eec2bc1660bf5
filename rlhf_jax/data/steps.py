"""Solutions with judged steps as ids: which token ends which step; imports encoding, tokenizer, rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data import encoding, scans
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.data.rows import ProcessSteps
from rlhf_jax.errors import InputError

_OTHER_MARK = "give a --config.step_mark that no step has in it"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedSteps:
    """Ids of a solution, and (response column of the token that ends it, label) of each step that was judged."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    judged: tuple[tuple[int, float], ...]
    row: ProcessSteps


def encode_process_steps(
    rows: Sequence[ProcessSteps],
    tokenizer: PreTrainedTokenizerFast,
    *,
    step_mark: str,
    prompt_length: int,
    response_length: int,
    truncation: str = "error",
    progress: scans.Progress = scans.unseen,
) -> tuple[encoding.Encoded[EncodedSteps], encoding.EncodeReport]:
    """Ids of each solution that fits, steps joined by ``step_mark``; see `encoding.encode_demonstrations`.

    A step ends at the next token that has the mark in it, and the last one at EOS: what `step_ends` finds in a policy's
    own text. A row where that gives another number of steps, as one with the mark inside of a step, is an `InputError`
    under "error", and dropped otherwise. A step that a cut goes through loses its label.
    """
    limits = encoding.Limits.of(tokenizer, prompt_length, response_length, truncation)
    marks = tokenizers.tokens_with(tokenizer, step_mark)
    encode = functools.partial(_steps_of, tokenizer, limits, step_mark, marks=marks)
    return encoding.encode_rows(
        rows,
        encode,
        progress=progress,
        remedy=f"{_OTHER_MARK}, or raise --config.data.prompt_length or --config.data.response_length",
    )


def _steps_of(
    tokenizer: Any,
    limits: encoding.Limits,
    step_mark: str,
    rows: Sequence[ProcessSteps],
    *,
    marks: np.ndarray,
) -> tuple[list[tuple[int, EncodedSteps]], encoding.EncodeReport]:
    pairs = tokenizers.encode_many(tokenizer, [(row.prompt, step_mark.join(row.steps)) for row in rows])
    columns = [step_ends(response_ids, marks) for _, response_ids in pairs]
    uneven = [
        (row.source, f"has {len(row.steps)} steps, and {len(ends)} when divided at {step_mark!r}")
        for row, ends in zip(rows, columns, strict=True)
        if len(ends) != len(row.steps)
    ]
    if uneven and limits.truncation == "error":
        raise InputError(
            f"{uneven[0][0]} {uneven[0][1]}: {_OTHER_MARK}, or pass --config.data.truncation=drop."
        )
    even = [place for place, row in enumerate(rows) if len(columns[place]) == len(row.steps)]
    fitted, report = encoding.fit_all([(rows[place].source, (pairs[place],)) for place in even], limits)
    encoded = []
    for number, ((prompt_ids, response_ids),) in fitted:
        place = even[number]
        judged = tuple(
            (column, label)
            for column, label in zip(columns[place], rows[place].labels, strict=True)
            if label is not None and column < len(response_ids)
        )
        steps = EncodedSteps(prompt_ids=prompt_ids, response_ids=response_ids, judged=judged, row=rows[place])
        encoded.append((place, steps))
    return encoded, dataclasses.replace(report, dropped=(*uneven, *report.dropped))


def step_ends(response_ids: Sequence[int], marks: np.ndarray) -> list[int]:
    """The columns where steps end: tokens that ``marks`` [V] bool has, and the last token."""
    last = len(response_ids) - 1
    return [column for column, token in enumerate(response_ids) if marks[token] or column == last]
