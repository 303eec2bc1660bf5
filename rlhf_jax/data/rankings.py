"""Rankings as ids: every response of a prompt in one row; imports encoding, encoded, rows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data import encoding, scans
from rlhf_jax.data.encoded import EncodedPreference, EncodedRanking
from rlhf_jax.data.rows import Preference, Ranking, ranks
from rlhf_jax.errors import InputError


def encode_rankings(
    rows: Sequence[Ranking],
    tokenizer: PreTrainedTokenizerFast,
    *,
    ranking_size: int,
    prompt_length: int,
    response_length: int,
    truncation: str = "error",
    progress: scans.Progress = scans.unseen,
) -> tuple[encoding.Encoded[EncodedRanking], encoding.EncodeReport]:
    """Ids of each ranking that fits; see `encoding.encode_demonstrations` for the other arguments.

    One with more than ``ranking_size`` responses, or whose responses are all the same ids, is an `InputError` under
    "error", and dropped otherwise; one whose votes put no response before another is dropped always. Batches say how
    likely an order is where rows have ``targets``, which all have or none.
    """
    limits = encoding.Limits.of(tokenizer, prompt_length, response_length, truncation)
    encode = functools.partial(_rankings_of, tokenizer, limits, ranking_size)
    return encoding.encode_rows(
        rows,
        encode,
        progress=progress,
        remedy="raise --config.data.ranking_size, --config.data.prompt_length or --config.data.response_length",
    )


def _rankings_of(
    tokenizer: Any, limits: encoding.Limits, size: int, rows: Sequence[Ranking]
) -> tuple[list[tuple[int, EncodedRanking]], encoding.EncodeReport]:
    large = [
        (row.source, f"has {len(row.responses)} responses where ranking_size is {size}")
        for row in rows
        if len(row.responses) > size
    ]
    if large and limits.truncation == "error":
        raise InputError(
            f"{large[0][0]} {large[0][1]}: raise --config.data.ranking_size, or pass --config.data.truncation=drop."
        )
    # Votes in a circle put no response before another, and have nothing to teach.
    equal = [
        (row.source, "has votes that put no response before another")
        for row in rows
        if len(row.responses) <= size and len(set(ranks(row))) == 1
    ]
    kept = [
        place for place, row in enumerate(rows) if len(row.responses) <= size and len(set(ranks(row))) > 1
    ]
    asked = [rows[place] for place in kept for _ in rows[place].responses]
    said = [response for place in kept for response in rows[place].responses]
    ids = iter(encoding.pairs_of_ids(tokenizer, asked, said))
    sides = [tuple(itertools.islice(ids, len(rows[place].responses))) for place in kept]
    fitted, report = encoding.fit_all(
        [(rows[place].source, own) for place, own in zip(kept, sides, strict=True)], limits
    )
    return [
        (kept[number], EncodedRanking(sides=cut, size=size, row=rows[kept[number]])) for number, cut in fitted
    ], encoding.EncodeReport(
        kept=report.kept, dropped=(*large, *equal, *report.dropped), truncated=report.truncated
    )


def orders(row: Ranking, size: int) -> np.ndarray:
    """[size, size] float32: how likely it is that one response is better than another, by the row's ``targets``.

    1 where nobody compared the two, whose order then is that of the ranks: what a hard label says.
    """
    likely = np.ones((size, size), np.float32)
    for comparison, target in zip(row.comparisons, row.targets, strict=True):
        likely[comparison.first, comparison.second] = target
        likely[comparison.second, comparison.first] = 1.0 - target
    return likely


def best_and_worst(
    encoded: encoding.Encoded[EncodedRanking], count: int
) -> encoding.Encoded[EncodedPreference]:
    """The response ranked first and the one ranked last of the first ``count`` rankings, as pairs in memory."""
    found = []
    for ranking in encoded.rows[:count]:
        order = ranks(ranking.row)
        best, worst = int(np.argmin(order)), int(np.argmax(order))
        (chosen_prompt_ids, chosen_ids), (rejected_prompt_ids, rejected_ids) = (
            ranking.sides[best],
            ranking.sides[worst],
        )
        found.append(
            EncodedPreference(
                chosen_prompt_ids=chosen_prompt_ids,
                chosen_ids=chosen_ids,
                rejected_prompt_ids=rejected_prompt_ids,
                rejected_ids=rejected_ids,
                row=Preference(
                    prompt=ranking.row.prompt,
                    chosen=ranking.row.responses[best],
                    rejected=ranking.row.responses[worst],
                    source=ranking.row.source,
                    group=ranking.row.group,
                ),
            )
        )
    return encoding.Encoded(
        rows=tuple(found),
        prompt_length=encoded.prompt_length,
        response_length=encoded.response_length,
        pad_id=encoded.pad_id,
    )
