"""From rows to ids that fit: tokenised together, divided at the boundary, cut or refused; imports prepared and scans.

Rows in memory are encoded at once. Those of a prepared set are encoded once to learn which fit and how long they are
(`scans`), and again, by whoever makes a batch, when the batch needs them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, Generic

import numpy as np
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data import conversations, pipeline, scans
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.data.encoded import (
    EncodedDemonstration,
    EncodedPreference,
    EncodedPrompt,
    EncodedRow,
    lengths_of_row,
)
from rlhf_jax.data.mixtures import Mixture
from rlhf_jax.data.prepared import PreparedRows
from rlhf_jax.data.rows import Demonstration, Preference, Prompt
from rlhf_jax.errors import InputError

TRUNCATIONS = ("error", "drop", "keep_start", "keep_end")
_LONGER = "raise --config.data.prompt_length or --config.data.response_length"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded(Generic[EncodedRow]):
    """Rows that fit P = ``prompt_length`` and R = ``response_length`` columns, and the id that pads them.

    rows: all in memory, or `EncodedWhenRead`. sources: which of them are drawn together, and how often; none where
    they are of one source.
    """

    rows: Sequence[EncodedRow]
    prompt_length: int
    response_length: int
    pad_id: int
    sources: tuple[pipeline.Source, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EncodedWhenRead(Sequence):
    """Rows of a prepared set, each encoded when it is asked for.

    encode: from rows to (place, encoded row) of each that is kept. lengths: [N, 2] int32, ids of prompt and response.
    """

    rows: PreparedRows
    encode: Callable[[Sequence[Any]], tuple[list[tuple[int, Any]], EncodeReport]]
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            places = np.arange(len(self))[place]
            return dataclasses.replace(self, rows=self.rows.select(places), lengths=self.lengths[places])
        ((_, encoded),), _ = self.encode([self.rows[place]])
        return encoded

    def fetch(self, places: np.ndarray) -> list[Any]:
        """The encoded rows at some places, read and tokenised together."""
        return [encoded for _, encoded in self.encode(self.rows.fetch(places))[0]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeReport:
    """kept: rows encoded, truncated ones included. dropped, truncated: (source, reason) of each such row. repeated: how
    many more there were with a prompt that had come before, where each is used once.
    """

    kept: int
    repeated: int = 0
    dropped: tuple[tuple[str, str], ...] = ()
    truncated: tuple[tuple[str, str], ...] = ()


def encode_demonstrations(
    rows: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerFast,
    *,
    prompt_length: int,
    response_length: int,
    truncation: str = "error",
    progress: scans.Progress = scans.unseen,
) -> tuple[Encoded[EncodedDemonstration], EncodeReport]:
    """Ids of each row that fits.

    rows: in memory, of a prepared set, or a `Mixture` of such.
    truncation: what to do with a row of more than ``prompt_length`` or ``response_length`` ids: "error"
      raises `InputError`; "drop" leaves the row out; "keep_start" and "keep_end" keep that part of the
      *prompt* (and its BOS), while a response always keeps its start, and loses its EOS because it did not
      end there.
    progress: called while a prepared set is scanned, which is once for a tokenizer and limits.
    """
    limits = Limits.of(tokenizer, prompt_length, response_length, truncation)
    return encode_rows(rows, functools.partial(_demonstrations_of, tokenizer, limits), progress=progress)


def encode_preferences(
    rows: Sequence[Preference],
    tokenizer: PreTrainedTokenizerFast,
    *,
    prompt_length: int,
    response_length: int,
    truncation: str = "error",
    progress: scans.Progress = scans.unseen,
) -> tuple[Encoded[EncodedPreference], EncodeReport]:
    """Ids of each pair that fits; see `encode_demonstrations` for ``rows``, ``truncation`` and ``progress``.

    A pair whose two sides are the same ids, as a tokenizer that knows few words or a cut can make them, says
    nothing: it is an `InputError` under "error", and dropped otherwise.

    Batches say how likely a label is where rows have a ``target``, which all have or none.
    """
    limits = Limits.of(tokenizer, prompt_length, response_length, truncation)
    return encode_rows(rows, functools.partial(_preferences_of, tokenizer, limits), progress=progress)


def encode_prompts(
    rows: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerFast,
    *,
    prompt_length: int,
    truncation: str = "error",
    progress: scans.Progress = scans.unseen,
) -> tuple[Encoded[EncodedPrompt], EncodeReport]:
    """Ids of each prompt that fits; see `encode_demonstrations` for the other arguments. R is 0."""
    limits = Limits.of(tokenizer, prompt_length, 1, truncation)
    encoded, report = encode_rows(rows, functools.partial(_prompts_of, tokenizer, limits), progress=progress)
    return dataclasses.replace(encoded, response_length=0), report


def encode_rows(
    rows: Sequence,
    encode: functools.partial,
    *,
    progress: scans.Progress = scans.unseen,
    remedy: str = _LONGER,
) -> tuple[Encoded, EncodeReport]:
    """What a kind of row is encoded by, and which rows fit.

    Args:
      rows: see `encode_demonstrations`.
      encode: from rows to ((place, encoded row) of each that fits, report). Its first arguments are the tokenizer and
        the `Limits`; whatever texts follow decide about rows too.
      progress: see `encode_demonstrations`.
      remedy: what to do about it where no row fits.
    """
    tokenizer, limits = encode.args[:2]
    if isinstance(rows, Mixture):
        parts = [encode_rows(part, encode, progress=progress, remedy=remedy) for part in rows.parts]
        mixture = dataclasses.replace(rows, parts=tuple(encoded.rows for encoded, _ in parts))
        report = EncodeReport(
            kept=sum(report.kept for _, report in parts),
            dropped=tuple(entry for _, report in parts for entry in report.dropped),
            truncated=tuple(entry for _, report in parts for entry in report.truncated),
        )
        return _encoded(mixture, tokenizer, limits, mixture.sources()), report
    if isinstance(rows, PreparedRows):
        encoded, report = _encode_when_read(rows, encode, progress)
    else:
        fitted, report = encode(rows)
        encoded = tuple(row for _, row in fitted)
    if report.dropped and not report.kept:
        source, reason = report.dropped[0]
        raise InputError(
            f"all {len(report.dropped)} rows were dropped, the first ({source}) because it {reason}: {remedy}."
        )
    return _encoded(encoded, tokenizer, limits), report


def _encode_when_read(
    rows: PreparedRows, encode: functools.partial, progress: scans.Progress
) -> tuple[EncodedWhenRead, EncodeReport]:
    tokenizer, limits, *others = encode.args

    def measure(chunk: Sequence) -> tuple[list[tuple[int, int, int]], Sequence, Sequence]:
        fitted, report = encode(chunk)
        return [(place, *lengths_of_row(row)) for place, row in fitted], report.dropped, report.truncated

    text = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    what = [encode.func.__name__, dataclasses.asdict(limits), hashlib.sha256(text.encode()).hexdigest()]
    identity = json.dumps([*what, tokenizers.fingerprint(tokenizer), *others])
    found = scans.scan(rows, measure, identity, progress)
    places = np.flatnonzero(found.kept[rows.indices])
    asked_for = np.zeros(len(rows.source), bool)
    asked_for[rows.indices] = True
    report = EncodeReport(
        kept=len(places),
        dropped=tuple((source, why) for number, source, why in found.dropped if asked_for[number]),
        truncated=tuple((source, why) for number, source, why in found.truncated if asked_for[number]),
    )
    kept = rows.select(places)
    return EncodedWhenRead(rows=kept, encode=encode, lengths=found.lengths[kept.indices]), report


def pairs_of_ids(
    tokenizer: Any, rows: Sequence[Any], responses: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, response ids) of each row's prompt with a response: texts at once, conversations one by one."""
    texts = [
        (row.prompt, response) for row, response in zip(rows, responses, strict=True) if not row.messages
    ]
    encoded = iter(tokenizers.encode_many(tokenizer, texts))
    return [
        conversations.encode_conversation(tokenizer, row.messages, response, row.source)
        if row.messages
        else next(encoded)
        for row, response in zip(rows, responses, strict=True)
    ]


def _demonstrations_of(
    tokenizer: Any, limits: Limits, rows: Sequence[Demonstration]
) -> tuple[list[tuple[int, EncodedDemonstration]], EncodeReport]:
    pairs = pairs_of_ids(tokenizer, rows, [row.response for row in rows])
    fitted, report = fit_all([(row.source, (pair,)) for row, pair in zip(rows, pairs, strict=True)], limits)
    return [
        (place, EncodedDemonstration(prompt_ids=prompt_ids, response_ids=response_ids, row=rows[place]))
        for place, ((prompt_ids, response_ids),) in fitted
    ], report


def _preferences_of(
    tokenizer: Any, limits: Limits, rows: Sequence[Preference]
) -> tuple[list[tuple[int, EncodedPreference]], EncodeReport]:
    chosen = pairs_of_ids(tokenizer, rows, [row.chosen for row in rows])
    rejected = pairs_of_ids(tokenizer, rows, [row.rejected for row in rows])
    fitted, report = fit_all(
        [(row.source, sides) for row, *sides in zip(rows, chosen, rejected, strict=True)], limits
    )
    return [
        (
            place,
            EncodedPreference(
                chosen_prompt_ids=chosen_prompt_ids,
                chosen_ids=chosen_ids,
                rejected_prompt_ids=rejected_prompt_ids,
                rejected_ids=rejected_ids,
                row=rows[place],
            ),
        )
        for place, ((chosen_prompt_ids, chosen_ids), (rejected_prompt_ids, rejected_ids)) in fitted
    ], report


def _prompts_of(
    tokenizer: Any, limits: Limits, rows: Sequence[Prompt]
) -> tuple[list[tuple[int, EncodedPrompt]], EncodeReport]:
    ids = [
        conversations.encode_turns(tokenizer, row.messages, row.source)
        if row.messages
        else tokenizers.encode_prompt(tokenizer, row.prompt)
        for row in rows
    ]
    fitted, report = fit_all(
        [(row.source, ((prompt_ids, []),)) for row, prompt_ids in zip(rows, ids, strict=True)], limits
    )
    return [
        (place, EncodedPrompt(prompt_ids=prompt_ids, row=rows[place])) for place, ((prompt_ids, _),) in fitted
    ], report


def _encoded(
    rows: Sequence, tokenizer: PreTrainedTokenizerFast, limits: Limits, sources: tuple = ()
) -> Encoded:
    return Encoded(
        rows=rows,
        prompt_length=limits.prompt_length,
        response_length=limits.response_length,
        pad_id=tokenizers.pad_id(tokenizer),
        sources=sources,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How many ids fit, and what happens to more."""

    prompt_length: int
    response_length: int
    truncation: str
    has_bos: bool

    @staticmethod
    def of(
        tokenizer: PreTrainedTokenizerFast, prompt_length: int, response_length: int, truncation: str
    ) -> Limits:
        if truncation not in TRUNCATIONS:
            raise InputError(f"truncation is {truncation!r}: use one of {', '.join(TRUNCATIONS)}.")
        has_bos = tokenizer.bos_token_id is not None
        if prompt_length < 1 + has_bos or response_length < 1:
            raise InputError(
                f"prompt_length is {prompt_length} and response_length {response_length}: give room for one "
                "token of each, and for a first BOS."
            )
        return Limits(
            prompt_length=prompt_length,
            response_length=response_length,
            truncation=truncation,
            has_bos=has_bos,
        )


def _excess(prompt_ids: Sequence[int], response_ids: Sequence[int], limits: Limits) -> str:
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


def _cut(prompt_ids: Sequence[int], response_ids: Sequence[int], limits: Limits) -> tuple[tuple, tuple]:
    prompt_ids = tuple(prompt_ids)
    if len(prompt_ids) > limits.prompt_length:
        head = prompt_ids[:1] if limits.has_bos else ()
        body, room = prompt_ids[len(head) :], limits.prompt_length - len(head)
        prompt_ids = head + (body[:room] if limits.truncation == "keep_start" else body[-room:])
    return prompt_ids, tuple(response_ids[: limits.response_length])


def fit_all(
    sides_of_rows: Sequence[tuple[str, Sequence[tuple[Sequence[int], Sequence[int]]]]], limits: Limits
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
                f"{source} has {excess}: {_LONGER}, or pass --config.data.truncation=drop, keep_start or keep_end."
            )
        if excess and limits.truncation == "drop":
            dropped.append((source, f"has {excess}"))
            continue
        cut = tuple(_cut(*side, limits) for side in sides)
        if len(cut) > 1 and len(set(cut)) == 1:
            same = f"has {'two' if len(cut) == 2 else len(cut)} responses of the same tokens"
            if limits.truncation == "error":
                raise InputError(
                    f"{source} {same}: give a tokenizer that can tell them apart, or pass "
                    "--config.data.truncation=drop."
                )
            dropped.append((source, f"{same}, as far as they are kept"))
            continue
        if excess:
            truncated.append((source, f"has {excess}"))
        fitted.append((index, cut))
    return fitted, EncodeReport(kept=len(fitted), dropped=tuple(dropped), truncated=tuple(truncated))


def digest_of(encoded: Encoded) -> str:
    """SHA-256 of what every row says, in order; rows of a prepared set are not read for it.

    Of such a set it is that of what was written, of which rows of it are meant, and of how they are encoded.
    """
    found = hashlib.sha256()
    if isinstance(encoded.rows, Mixture):
        for part in encoded.rows.parts:
            found.update(digest_of(dataclasses.replace(encoded, rows=part)).encode())
    elif isinstance(encoded.rows, EncodedWhenRead):
        rows = encoded.rows.rows
        found.update(json.dumps([rows.digest, rows.view]).encode())
        found.update(np.ascontiguousarray(rows.indices, "<i8").tobytes())
        found.update(np.ascontiguousarray(encoded.rows.lengths, "<i4").tobytes())
    else:
        for row in encoded.rows:
            found.update(repr(row).encode("utf-8", "backslashreplace"))
    return found.hexdigest()


def lengths_of(encoded: Encoded) -> np.ndarray:
    """[N, 2] int32: ids of prompt and response of each row, without reading it where that is known."""
    if isinstance(encoded.rows, EncodedWhenRead):
        return encoded.rows.lengths
    if isinstance(encoded.rows, Mixture):
        parts = [lengths_of(dataclasses.replace(encoded, rows=part)) for part in encoded.rows.parts]
        return np.concatenate(parts)
    return np.array([lengths_of_row(row) for row in encoded.rows], np.int32).reshape(-1, 2)
