"""Batches of encoded rows: how rows lie in them, and endless iterators over them; imports encoding, pipeline, packing.

jax is imported for its trees alone; no array here is a jax array. The layout is that of `rlhf_jax.types`: prompts end
at column P (padding on the left), responses begin there (padding on the right), masks come from lengths.

What `encoding` has is offered here too, so that a stage needs one name.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax.data import mixtures, packing, pipeline, rankings
from rlhf_jax.data.encoded import EncodedDemonstration, EncodedPreference, EncodedPrompt, EncodedRanking
from rlhf_jax.data.encoding import (
    TRUNCATIONS,
    Encoded,
    EncodeReport,
    digest_of,
    encode_demonstrations,
    encode_preferences,
    encode_prompts,
    lengths_of,
)
from rlhf_jax.data.rankings import encode_rankings
from rlhf_jax.data.rows import Preference, label_of, ranks
from rlhf_jax.data.steps import EncodedSteps, encode_process_steps
from rlhf_jax.errors import InputError
from rlhf_jax.types import DemonstrationBatch, PreferenceBatch, RankingBatch, StepsBatch

__all__ = [
    "TRUNCATIONS",
    "Encoded",
    "EncodedDemonstration",
    "EncodedPreference",
    "EncodedPrompt",
    "EncodedRanking",
    "EncodedSteps",
    "EncodeReport",
    "encode_demonstrations",
    "encode_preferences",
    "encode_process_steps",
    "encode_prompts",
    "encode_rankings",
    "demonstration_batches",
    "preference_batches",
    "steps_batches",
    "prompt_batches",
    "packed_batches",
    "eval_batches",
    "bucketed",
    "pad_left",
    "pad_right",
]

_WHOLE = pipeline.Share()


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


def _lay_out_ranking(encoded: Encoded, row: EncodedRanking) -> RankingBatch:
    """One row, without the batch axis. Where there are fewer than K responses the first is there again, masked out."""
    given, size = len(row.sides), row.size
    sides = [*row.sides, *[row.sides[0]] * (size - given)]
    return RankingBatch(
        responses=jax.tree.map(
            lambda *leaves: np.stack(leaves), *(_lay_out(encoded, *side) for side in sides)
        ),
        ranks=np.array([*ranks(row.row), *[0] * (size - given)], np.int32),
        mask=np.arange(size) < given,
        probability=None if row.row.targets is None else rankings.orders(row.row, size),
    )


def _labels_of(row: Preference) -> dict[str, np.ndarray]:
    """What a batch says of a pair's label, or of its labels by several objectives; 0 where nobody judged."""
    if row.objectives:
        labels = [label_of(row, name) for name in row.objectives]
        return {
            "probability": np.array([label or 0.0 for label in labels], np.float32),
            "judged": np.array([label is not None for label in labels]),
        }
    return {} if row.target is None else {"probability": np.float32(row.target)}


def _lay_out_row(encoded: Encoded, index: int, row: Any) -> Any:
    """What a batch holds of one row, without the batch axis; ``index``: its place in ``encoded.rows``."""
    if isinstance(row, EncodedDemonstration):
        return _lay_out(encoded, row.prompt_ids, row.response_ids)
    if isinstance(row, EncodedPreference):
        return PreferenceBatch(
            chosen=_lay_out(encoded, row.chosen_prompt_ids, row.chosen_ids),
            rejected=_lay_out(encoded, row.rejected_prompt_ids, row.rejected_ids),
            **_labels_of(row.row),
        )
    if isinstance(row, EncodedRanking):
        return _lay_out_ranking(encoded, row)
    if isinstance(row, EncodedSteps):
        labels, judged = (np.zeros(encoded.response_length, kind) for kind in (np.float32, bool))
        for column, label in row.judged:
            labels[column], judged[column] = label, True
        responses = _lay_out(encoded, row.prompt_ids, row.response_ids)
        return StepsBatch(responses=responses, step_labels=labels, step_mask=judged)
    tokens, mask = pad_left(row.prompt_ids, encoded.prompt_length, encoded.pad_id)
    return {"tokens": tokens, "token_mask": mask, "index": np.int32(index)}


def _make_batch(encoded: Encoded, indices: np.ndarray) -> Any:
    rows = mixtures.fetch(encoded.rows, indices)
    laid_out = [_lay_out_row(encoded, int(i), row) for i, row in zip(indices, rows, strict=True)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *laid_out)


def _sources(encoded: Encoded, numbers: np.ndarray) -> list[str]:
    return [row.row.source for row in mixtures.fetch(encoded.rows, numbers)]


def demonstration_batches(
    encoded: Encoded[EncodedDemonstration],
    *,
    batch_size: int,
    seed: int,
    share: pipeline.Share = _WHOLE,
    num_buckets: int = 1,
) -> pipeline.BatchIterator:
    """Endless batches, reshuffled every epoch; S = P + R.

    ``get_state`` and ``set_state`` work between any two batches. A batch may begin in one epoch and end in the next, so
    that every row is seen once an epoch, whatever the batch size.

    share: which rows of each batch this process reads, and with how many workers.
    num_buckets: a batch has rows of about the same length, and one of so many widths; see `bucketed`. 1: rows of any
      length together.
    """
    return _batches(encoded, batch_size=batch_size, seed=seed, share=share, num_buckets=num_buckets)


def preference_batches(
    encoded: Encoded[EncodedPreference] | Encoded[EncodedRanking],
    *,
    batch_size: int,
    seed: int,
    share: pipeline.Share = _WHOLE,
    num_buckets: int = 1,
) -> pipeline.BatchIterator:
    """Endless batches of pairs, or of rankings; see `demonstration_batches`."""
    return _batches(encoded, batch_size=batch_size, seed=seed, share=share, num_buckets=num_buckets)


def steps_batches(
    encoded: Encoded[EncodedSteps], *, batch_size: int, seed: int, share: pipeline.Share = _WHOLE
) -> pipeline.BatchIterator:
    """Endless batches of solutions with judged steps; see `demonstration_batches`."""
    return _batches(encoded, batch_size=batch_size, seed=seed, share=share)


def prompt_batches(
    encoded: Encoded[EncodedPrompt], *, batch_size: int, seed: int, share: pipeline.Share = _WHOLE
) -> pipeline.BatchIterator:
    """Endless batches: tokens [B, P] int32, token_mask [B, P] bool, index [B] int32 into ``encoded.rows``."""
    return _batches(encoded, batch_size=batch_size, seed=seed, share=share)


def packed_batches(
    encoded: Encoded[EncodedDemonstration], *, batch_size: int, seed: int, share: pipeline.Share = _WHOLE
) -> pipeline.BatchIterator:
    """Endless batches of packed demonstrations: [B, S] with S = P + R, R of the batch S - 1, and ``segment_ids``.

    Which demonstrations lie in one row is decided once; rows are reshuffled every epoch. A loss that is a mean over
    response tokens is that of the same demonstrations in rows of their own. Other arguments: `demonstration_batches`.

    Raises:
      InputError: sources with weights, which bins of several sources cannot keep.
    """
    _check_batches(encoded, batch_size, seed, share)
    if encoded.sources:
        raise InputError("packed batches keep no weights of sources: give one source, or do not pack.")
    width = encoded.prompt_length + encoded.response_length
    bins = packing.pack(lengths_of(encoded).sum(axis=1), width, seed)
    order = pipeline.row_order([pipeline.Source(start=0, count=len(bins))], seed).batch(batch_size)
    make = functools.partial(_make_packed, encoded, bins)
    identity = _identity(encoded, batch_size, seed, "packed")
    sources = functools.partial(_packed_sources, encoded, bins)
    return pipeline.batches(order, make, share, identity=identity, sources_of=sources)


def _packed_sources(encoded: Encoded, bins: packing.Bins, numbers: np.ndarray) -> list[str]:
    return _sources(encoded, np.concatenate([bins.of(int(number)) for number in numbers]))


def _make_packed(encoded: Encoded, bins: packing.Bins, numbers: np.ndarray) -> DemonstrationBatch:
    members = [bins.of(int(number)) for number in numbers]
    rows = iter(mixtures.fetch(encoded.rows, np.concatenate(members)))
    width = encoded.prompt_length + encoded.response_length
    laid_out = []
    for places in members:
        ids = [(row.prompt_ids, row.response_ids) for row in itertools.islice(rows, len(places))]
        laid_out.append(packing.lay_out_packed(ids, width, encoded.pad_id))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *laid_out)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Buckets:
    """of_row: [N] int, the bucket of each row. widths: (prompt, response) columns of each bucket."""

    of_row: np.ndarray
    widths: tuple[tuple[int, int], ...]

    def rows(self) -> list[np.ndarray]:
        """The rows of each bucket."""
        return [np.flatnonzero(self.of_row == bucket) for bucket in range(len(self.widths))]


def bucketed(encoded: Encoded, num_buckets: int) -> Buckets:
    """Rows of about the same number of tokens together, in at most ``num_buckets`` of about as many rows each.

    A bucket is as wide as its longest prompt and its longest response.
    """
    lengths = lengths_of(encoded)
    totals = lengths.sum(axis=1)
    bounds = np.quantile(totals, np.arange(1, num_buckets) / num_buckets, method="lower")
    _, of_row = np.unique(np.searchsorted(bounds, totals, side="left"), return_inverse=True)
    widths = [lengths[of_row == bucket].max(axis=0) for bucket in range(of_row.max() + 1)]
    return Buckets(of_row=of_row, widths=tuple((int(prompt), int(response)) for prompt, response in widths))


def _batches(
    encoded: Encoded, *, batch_size: int, seed: int, share: pipeline.Share, num_buckets: int = 1
) -> pipeline.BatchIterator:
    _check_batches(encoded, batch_size, seed, share)
    if num_buckets < 1:
        raise InputError(f"the number of buckets is {num_buckets}: give 1 or more.")
    identity = _identity(encoded, batch_size, seed, num_buckets)
    sources = functools.partial(_sources, encoded)
    if num_buckets == 1:
        parts = encoded.sources or (pipeline.Source(start=0, count=len(encoded)),)
        order = pipeline.row_order(parts, seed).batch(batch_size)
        make = functools.partial(_make_batch, encoded)
        return pipeline.batches(order, make, share, identity=identity, sources_of=sources)
    if encoded.sources:
        raise InputError("buckets keep no weights of sources: give one source, or one bucket.")
    buckets = bucketed(encoded, num_buckets)
    order = pipeline.batch_order(buckets.rows(), batch_size, seed)
    make = functools.partial(_make_bucketed, encoded, buckets)
    return pipeline.batches(order, make, share, identity=identity, sources_of=sources)


def _make_bucketed(encoded: Encoded, buckets: Buckets, indices: np.ndarray) -> Any:
    """A batch of rows of one bucket."""
    prompt, response = buckets.widths[buckets.of_row[indices[0]]]
    return _make_batch(dataclasses.replace(encoded, prompt_length=prompt, response_length=response), indices)


def _check_batches(encoded: Encoded, batch_size: int, seed: int, share: pipeline.Share) -> None:
    if batch_size < 1 or not len(encoded):
        raise InputError(
            f"{len(encoded)} rows in batches of {batch_size} make no batch: give at least one of each."
        )
    if not 0 <= seed < 2**32:
        raise InputError(f"the data seed is {seed}: give one of at least 0 and below 2**32.")
    share.check(batch_size)


def _identity(encoded: Encoded, batch_size: int, seed: int, layout: Any) -> str:
    """Everything that decides which rows are in which batch, and what they say."""
    shape = (
        digest_of(encoded),
        len(encoded),
        encoded.prompt_length,
        encoded.response_length,
        encoded.pad_id,
    )
    sources = [dataclasses.astuple(source) for source in encoded.sources]
    return json.dumps([*shape, sources, batch_size, seed, layout])


def eval_batches(encoded: Encoded, batch_size: int) -> Iterator[tuple[Any, np.ndarray]]:
    """(batch, row mask [B] bool) over all rows once, in order.

    The batch is of the kind that the endless iterators yield. The last one is filled up with the last row,
    marked False, so that every batch has the same shape and nothing is dropped.
    """
    if batch_size < 1:
        raise InputError(f"an evaluation batch size of {batch_size} makes no batch: give at least 1.")
    for start in range(0, len(encoded), batch_size):
        indices = np.arange(start, start + batch_size)
        yield _make_batch(encoded, np.minimum(indices, len(encoded) - 1)), indices < len(encoded)
