"""Encoded rows and the Grain pipelines that batch them, in numpy; imports types, rows, tokenizer, grain.

jax is imported for its trees alone; no array here is a jax array.

The layout is that of `rlhf_jax.types`: prompts end at column P (padding on the left), responses begin there
(padding on the right), masks come from lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import grain
import jax
import numpy as np
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.data.rows import Demonstration, Preference, ProcessSteps, Prompt
from rlhf_jax.errors import InputError
from rlhf_jax.types import DemonstrationBatch, PreferenceBatch, StepsBatch

TRUNCATIONS = ("error", "drop", "keep_start", "keep_end")
# Endless for every purpose; Grain's own "endless" overflows an index when batches hold one row.
_EPOCHS = 2**31


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """Ids of a prompt."""

    prompt_ids: tuple[int, ...]
    row: Prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedSteps:
    """Ids of a solution, and (response column of the token that ends it, label) of each step that was judged."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    judged: tuple[tuple[int, float], ...]
    row: ProcessSteps


EncodedRow = TypeVar("EncodedRow", EncodedDemonstration, EncodedPreference, EncodedPrompt, EncodedSteps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded(Generic[EncodedRow]):
    """Rows that fit P = ``prompt_length`` and R = ``response_length`` columns, and the id that pads them."""

    rows: tuple[EncodedRow, ...]
    prompt_length: int
    response_length: int
    pad_id: int

    def __len__(self) -> int:
        return len(self.rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeReport:
    """kept: rows encoded, truncated ones included. dropped, truncated: (source, reason) of each such row."""

    kept: int
    dropped: tuple[tuple[str, str], ...] = ()
    truncated: tuple[tuple[str, str], ...] = ()


def encode_demonstrations(
    rows: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerFast,
    *,
    prompt_length: int,
    response_length: int,
    truncation: str = "error",
) -> tuple[Encoded[EncodedDemonstration], EncodeReport]:
    """Ids of each row that fits.

    truncation: what to do with a row of more than ``prompt_length`` or ``response_length`` ids: "error"
      raises `InputError`; "drop" leaves the row out; "keep_start" and "keep_end" keep that part of the
      *prompt* (and its BOS), while a response always keeps its start, and loses its EOS because it did not
      end there.
    """
    pairs = tokenizers.encode_many(tokenizer, [(row.prompt, row.response) for row in rows])
    fitted, report = _fit_all(
        [(row.source, (pair,)) for row, pair in zip(rows, pairs, strict=True)],
        _Limits.of(tokenizer, prompt_length, response_length, truncation),
    )
    encoded = tuple(
        EncodedDemonstration(prompt_ids=prompt_ids, response_ids=response_ids, row=rows[index])
        for index, ((prompt_ids, response_ids),) in fitted
    )
    return _encoded(encoded, tokenizer, prompt_length, response_length), report


def encode_preferences(
    rows: Sequence[Preference],
    tokenizer: PreTrainedTokenizerFast,
    *,
    prompt_length: int,
    response_length: int,
    truncation: str = "error",
) -> tuple[Encoded[EncodedPreference], EncodeReport]:
    """Ids of each pair that fits; see `encode_demonstrations` for ``truncation``.

    A pair whose two sides are the same ids, as a tokenizer that knows few words or a cut can make them, says
    nothing: it is an `InputError` under "error", and dropped otherwise.
    """
    chosen = tokenizers.encode_many(tokenizer, [(row.prompt, row.chosen) for row in rows])
    rejected = tokenizers.encode_many(tokenizer, [(row.prompt, row.rejected) for row in rows])
    fitted, report = _fit_all(
        [(row.source, sides) for row, *sides in zip(rows, chosen, rejected, strict=True)],
        _Limits.of(tokenizer, prompt_length, response_length, truncation),
    )
    encoded = tuple(
        EncodedPreference(
            chosen_prompt_ids=chosen_prompt_ids,
            chosen_ids=chosen_ids,
            rejected_prompt_ids=rejected_prompt_ids,
            rejected_ids=rejected_ids,
            row=rows[index],
        )
        for index, ((chosen_prompt_ids, chosen_ids), (rejected_prompt_ids, rejected_ids)) in fitted
    )
    return _encoded(encoded, tokenizer, prompt_length, response_length), report


def encode_process_steps(
    rows: Sequence[ProcessSteps],
    tokenizer: PreTrainedTokenizerFast,
    *,
    step_mark: str,
    prompt_length: int,
    response_length: int,
    truncation: str = "error",
) -> tuple[Encoded[EncodedSteps], EncodeReport]:
    """Ids of each solution that fits, steps joined by ``step_mark``; see `encode_demonstrations` for ``truncation``.

    A step ends at the next token that has the mark in it, and the last one at EOS: what `step_ends` finds in a policy's
    own text. A row where that gives another number of steps, as one with the mark inside of a step, is an `InputError`
    under "error", and dropped otherwise. A step that a cut goes through loses its label.
    """
    marks = tokenizers.tokens_with(tokenizer, step_mark)
    pairs = tokenizers.encode_many(tokenizer, [(row.prompt, step_mark.join(row.steps)) for row in rows])
    ends = [step_ends(response_ids, marks) for _, response_ids in pairs]
    whole = [index for index, row in enumerate(rows) if len(ends[index]) == len(row.steps)]
    uneven = [
        (row.source, f"has {len(row.steps)} steps, and {len(found)} when divided at {step_mark!r}")
        for row, found in zip(rows, ends, strict=True)
        if len(found) != len(row.steps)
    ]
    if uneven and (truncation == "error" or not whole):
        raise InputError(
            f"{uneven[0][0]} {uneven[0][1]}: give a --config.step_mark that no step has in it, or pass "
            "--config.data.truncation=drop."
        )
    fitted, report = _fit_all(
        [(rows[index].source, (pairs[index],)) for index in whole],
        _Limits.of(tokenizer, prompt_length, response_length, truncation),
    )
    encoded = []
    for number, ((prompt_ids, response_ids),) in fitted:
        row, columns = rows[whole[number]], ends[whole[number]]
        judged = tuple(
            (column, label)
            for column, label in zip(columns, row.labels, strict=True)
            if label is not None and column < len(response_ids)
        )
        encoded.append(EncodedSteps(prompt_ids=prompt_ids, response_ids=response_ids, judged=judged, row=row))
    report = dataclasses.replace(report, dropped=(*uneven, *report.dropped))
    return _encoded(tuple(encoded), tokenizer, prompt_length, response_length), report


def step_ends(response_ids: Sequence[int], marks: np.ndarray) -> list[int]:
    """The columns where steps end: tokens that ``marks`` [V] bool has, and the last token."""
    last = len(response_ids) - 1
    return [column for column, token in enumerate(response_ids) if marks[token] or column == last]


def encode_prompts(
    rows: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerFast,
    *,
    prompt_length: int,
    truncation: str = "error",
) -> tuple[Encoded[EncodedPrompt], EncodeReport]:
    """Ids of each prompt that fits; see `encode_demonstrations` for ``truncation``. R is 0."""
    ids = [tokenizers.encode_prompt(tokenizer, row.prompt) for row in rows]
    fitted, report = _fit_all(
        [(row.source, ((prompt_ids, []),)) for row, prompt_ids in zip(rows, ids, strict=True)],
        _Limits.of(tokenizer, prompt_length, 1, truncation),
    )
    encoded = tuple(EncodedPrompt(prompt_ids=ids, row=rows[index]) for index, ((ids, _),) in fitted)
    return _encoded(encoded, tokenizer, prompt_length, 0), report


def _encoded(
    rows: tuple, tokenizer: PreTrainedTokenizerFast, prompt_length: int, response_length: int
) -> Encoded:
    return Encoded(
        rows=rows,
        prompt_length=prompt_length,
        response_length=response_length,
        pad_id=tokenizers.pad_id(tokenizer),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Limits:
    """How many ids fit, and what happens to more."""

    prompt_length: int
    response_length: int
    truncation: str
    has_bos: bool

    @staticmethod
    def of(
        tokenizer: PreTrainedTokenizerFast, prompt_length: int, response_length: int, truncation: str
    ) -> _Limits:
        if truncation not in TRUNCATIONS:
            raise InputError(f"truncation is {truncation!r}: use one of {', '.join(TRUNCATIONS)}.")
        has_bos = tokenizer.bos_token_id is not None
        if prompt_length < 1 + has_bos or response_length < 1:
            raise InputError(
                f"prompt_length is {prompt_length} and response_length {response_length}: give room for one "
                "token of each, and for a first BOS."
            )
        return _Limits(
            prompt_length=prompt_length,
            response_length=response_length,
            truncation=truncation,
            has_bos=has_bos,
        )


def _excess(prompt_ids: Sequence[int], response_ids: Sequence[int], limits: _Limits) -> str:
    """What does not fit, in words; "" where everything does."""
    parts = []
    if len(prompt_ids) > limits.prompt_length:
        parts.append(f"a prompt of {len(prompt_ids)} tokens where prompt_length is {limits.prompt_length}")
    if len(response_ids) > limits.response_length:
        parts.append(
            f"a response of {len(response_ids)} tokens (EOS included) where response_length is "
            f"{limits.response_length}"
        )
    return " and ".join(parts)


def _cut(prompt_ids: Sequence[int], response_ids: Sequence[int], limits: _Limits) -> tuple[tuple, tuple]:
    prompt_ids = tuple(prompt_ids)
    if len(prompt_ids) > limits.prompt_length:
        head = prompt_ids[:1] if limits.has_bos else ()
        body, room = prompt_ids[len(head) :], limits.prompt_length - len(head)
        prompt_ids = head + (body[:room] if limits.truncation == "keep_start" else body[-room:])
    return prompt_ids, tuple(response_ids[: limits.response_length])


def _fit_all(
    sides_of_rows: Sequence[tuple[str, Sequence[tuple[Sequence[int], Sequence[int]]]]], limits: _Limits
) -> tuple[list[tuple[int, tuple]], EncodeReport]:
    """((row number, its sides cut to fit) of each row kept, report); a side is (prompt ids, response ids)."""
    fitted: list[tuple[int, tuple]] = []
    dropped: list[tuple[str, str]] = []
    truncated: list[tuple[str, str]] = []
    for index, (source, sides) in enumerate(sides_of_rows):
        if not all(prompt_ids for prompt_ids, _ in sides):
            raise InputError(
                f"{source} has no prompt token to respond to, and the tokenizer has no BOS: give it a prompt."
            )
        excess = next(filter(None, (_excess(*side, limits) for side in sides)), "")
        if excess and limits.truncation == "error":
            raise InputError(
                f"{source} has {excess}: raise --config.data.prompt_length or --config.data.response_length, "
                "or pass --config.data.truncation=drop, keep_start or keep_end."
            )
        if excess and limits.truncation == "drop":
            dropped.append((source, f"has {excess}"))
            continue
        cut = tuple(_cut(*side, limits) for side in sides)
        if len(cut) == 2 and cut[0] == cut[1]:
            if limits.truncation == "error":
                raise InputError(
                    f"{source} has two responses of the same tokens: give a tokenizer that can tell them apart, "
                    "or pass --config.data.truncation=drop."
                )
            dropped.append((source, "has two responses of the same tokens, as far as they are kept"))
            continue
        if excess:
            truncated.append((source, f"has {excess}"))
        fitted.append((index, cut))
    if dropped and not fitted:
        raise InputError(
            f"all {len(dropped)} rows were dropped, the first ({dropped[0][0]}) because it {dropped[0][1]}: "
            "raise --config.data.prompt_length or --config.data.response_length."
        )
    return fitted, EncodeReport(kept=len(fitted), dropped=tuple(dropped), truncated=tuple(truncated))


def pad_left(ids: Sequence[int], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids [length] int32, mask [length] bool), the ids at the end."""
    tokens, mask = np.full(length, pad_id, np.int32), np.zeros(length, bool)
    if ids:
        tokens[length - len(ids) :], mask[length - len(ids) :] = ids, True
    return tokens, mask


def pad_right(ids: Sequence[int], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids [length] int32, mask [length] bool), the ids at the beginning."""
    tokens, mask = np.full(length, pad_id, np.int32), np.zeros(length, bool)
    tokens[: len(ids)], mask[: len(ids)] = ids, True
    return tokens, mask


def _lay_out(encoded: Encoded, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> DemonstrationBatch:
    """One row, without the batch axis: tokens and token_mask [P + R], response_mask [R]."""
    prompt, prompt_mask = pad_left(prompt_ids, encoded.prompt_length, encoded.pad_id)
    response, response_mask = pad_right(response_ids, encoded.response_length, encoded.pad_id)
    return DemonstrationBatch(
        tokens=np.concatenate([prompt, response]),
        token_mask=np.concatenate([prompt_mask, response_mask]),
        response_mask=response_mask,
    )


def _row(encoded: Encoded, index: int) -> Any:
    """What a batch holds of one row, without the batch axis."""
    row = encoded.rows[index]
    if isinstance(row, EncodedDemonstration):
        return _lay_out(encoded, row.prompt_ids, row.response_ids)
    if isinstance(row, EncodedPreference):
        return PreferenceBatch(
            chosen=_lay_out(encoded, row.chosen_prompt_ids, row.chosen_ids),
            rejected=_lay_out(encoded, row.rejected_prompt_ids, row.rejected_ids),
        )
    if isinstance(row, EncodedSteps):
        labels, judged = (np.zeros(encoded.response_length, kind) for kind in (np.float32, bool))
        for column, label in row.judged:
            labels[column], judged[column] = label, True
        responses = _lay_out(encoded, row.prompt_ids, row.response_ids)
        return StepsBatch(responses=responses, step_labels=labels, step_mask=judged)
    tokens, mask = pad_left(row.prompt_ids, encoded.prompt_length, encoded.pad_id)
    return {"tokens": tokens, "token_mask": mask, "index": np.int32(index)}


def demonstration_batches(
    encoded: Encoded[EncodedDemonstration], *, batch_size: int, seed: int
) -> grain.DatasetIterator[DemonstrationBatch]:
    """Endless batches, reshuffled every epoch; S = P + R.

    ``get_state`` and ``set_state`` work between any two batches, and checkpoint with `grain.checkpoint`. A
    batch may begin in one epoch and end in the next, so that every row is seen once an epoch, whatever the
    batch size.
    """
    return _batches(encoded, batch_size=batch_size, seed=seed)


def preference_batches(
    encoded: Encoded[EncodedPreference], *, batch_size: int, seed: int
) -> grain.DatasetIterator[PreferenceBatch]:
    """Endless batches of pairs; see `demonstration_batches`."""
    return _batches(encoded, batch_size=batch_size, seed=seed)


def steps_batches(
    encoded: Encoded[EncodedSteps], *, batch_size: int, seed: int
) -> grain.DatasetIterator[StepsBatch]:
    """Endless batches of solutions with judged steps; see `demonstration_batches`."""
    return _batches(encoded, batch_size=batch_size, seed=seed)


def prompt_batches(
    encoded: Encoded[EncodedPrompt], *, batch_size: int, seed: int
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Endless batches: tokens [B, P] int32, token_mask [B, P] bool, index [B] int32 into ``encoded.rows``."""
    return _batches(encoded, batch_size=batch_size, seed=seed)


def _batches(encoded: Encoded, *, batch_size: int, seed: int) -> grain.DatasetIterator:
    if batch_size < 1 or not encoded.rows:
        raise InputError(
            f"{len(encoded)} rows in batches of {batch_size} make no batch: give at least one of each."
        )
    if not 0 <= seed < 2**32:
        raise InputError(f"the data seed is {seed}: give one of at least 0 and below 2**32.")
    dataset = (
        grain.MapDataset.range(len(encoded))
        .seed(seed)
        .shuffle()
        .repeat(_EPOCHS)
        .map(lambda index: _row(encoded, int(index)))
        .batch(batch_size)
    )
    # Rows lie in memory already: threads that read ahead would only compete with the computation.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def eval_batches(encoded: Encoded, batch_size: int) -> Iterator[tuple[Any, np.ndarray]]:
    """(batch, row mask [B] bool) over all rows once, in order.

    The batch is of the kind that the endless iterators yield. The last one is filled up with the last row,
    marked False, so that every batch has the same shape and nothing is dropped.
    """
    if batch_size < 1:
        raise InputError(f"an evaluation batch size of {batch_size} makes no batch: give at least 1.")
    for start in range(0, len(encoded), batch_size):
        indices = np.arange(start, start + batch_size)
        rows = [_row(encoded, min(int(i), len(encoded) - 1)) for i in indices]
        yield jax.tree.map(lambda *leaves: np.stack(leaves), *rows), indices < len(encoded)
