"""Solutions with judged steps as ids: which token ends which step; imports encoding, tokenizer, rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data import encoding
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.data.rows import Demonstration, ProcessSteps
from rlhf_jax.errors import InputError


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
) -> tuple[encoding.Encoded, encoding.EncodeReport]:
    """Ids of each solution that fits, steps joined by ``step_mark``; see `encoding.encode_demonstrations`.

    A step ends at the next token that has the mark in it, and the last one at EOS: what `step_ends` finds in a policy's
    own text. A row where that gives another number of steps, as one with the mark inside of a step, is an `InputError`
    under "error", and dropped otherwise. A step that a cut goes through loses its label.
    """
    marks = tokenizers.tokens_with(tokenizer, step_mark)
    told = [
        Demonstration(prompt=row.prompt, response=step_mark.join(row.steps), source=row.source)
        for row in rows
    ]
    pairs = tokenizers.encode_many(tokenizer, [(row.prompt, row.response) for row in told])
    even, uneven = {}, []
    for row, one, (_, response_ids) in zip(rows, told, pairs, strict=True):
        columns = step_ends(response_ids, marks)
        if len(columns) == len(row.steps):
            # By identity: sources need not be unique.
            even[id(one)] = (row, columns)
        else:
            uneven.append(
                (row.source, f"has {len(row.steps)} steps, and {len(columns)} when divided at {step_mark!r}")
            )
    if uneven and (truncation == "error" or not even):
        raise InputError(
            f"{uneven[0][0]} {uneven[0][1]}: give a --config.step_mark that no step has in it, or pass "
            "--config.data.truncation=drop."
        )
    encoded, report = encoding.encode_demonstrations(
        [one for one in told if id(one) in even],
        tokenizer,
        prompt_length=prompt_length,
        response_length=response_length,
        truncation=truncation,
    )
    judged = []
    for one in encoded.rows:
        row, columns = even[id(one.row)]
        labels = tuple(
            (column, label)
            for column, label in zip(columns, row.labels, strict=True)
            if label is not None and column < len(one.response_ids)
        )
        judged.append(
            EncodedSteps(prompt_ids=one.prompt_ids, response_ids=one.response_ids, judged=labels, row=row)
        )
    report = dataclasses.replace(report, dropped=(*uneven, *report.dropped))
    return dataclasses.replace(encoded, rows=tuple(judged)), report


def step_ends(response_ids: Sequence[int], marks: np.ndarray) -> list[int]:
    """The columns where steps end: tokens that ``marks`` [V] bool has, and the last token."""
    last = len(response_ids) - 1
    return [column for column, token in enumerate(response_ids) if marks[token] or column == last]
