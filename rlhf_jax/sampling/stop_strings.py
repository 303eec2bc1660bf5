"""Strings that end a response, found in the text of tokens while they are drawn; imports errors and NumPy only.

A stop string may begin and end anywhere, also in the middle of a token. Looking for it in decoded text would
take every token to the host before the next is drawn, or find it some tokens late. Here an automaton over bytes
(Aho and Corasick 1975) is folded, once and on the host, over the bytes of every token: what remains is a table,
state and token to next state, and one look-up a row and step inside the compiled loop finds every match at once
and exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_jax.errors import InputError


def stop_table(
    strings: Sequence[str],
    pieces: Sequence[bytes],
    *,
    vocab_size: int,
    eos_id: int,
    max_new_tokens: int,
) -> np.ndarray:
    """[S, V] int16: the state after a token; state 0 is the start, state S - 1 a match, which is never left.

    strings: any of them ends a response. pieces: what each id adds to a text, as UTF-8; ids from there to
    ``vocab_size`` add nothing, and neither does ``eos_id``, which ends a response by itself. max_new_tokens:
    how many tokens are searched at most. S is at most one more than the bytes of all strings together.

    Raises:
        InputError: there is no string, one is empty, or one can never match: the tokens cannot write it, or
            not within ``max_new_tokens``; the message names it.
    """
    if not strings:
        raise InputError("no stop string was given: give one, or no table of them")
    padded, lengths = _byte_matrix(pieces, vocab_size, eos_id)
    for string in strings:
        if not string:
            raise InputError(
                "a stop string is empty, which would end every response before it begins: leave it out"
            )
        fewest = _fewest_tokens(_fold(_automaton([string.encode()]), padded, lengths))
        if fewest is None:
            raise InputError(
                f"stop string {string!r} can never match, as no tokens of this tokenizer write it: give text "
                "that the model can write"
            )
        if fewest > max_new_tokens:
            raise InputError(
                f"stop string {string!r} can never match, as it takes {fewest} tokens and {max_new_tokens} are "
                "searched at most: give a shorter one, or more new tokens"
            )
    return _fold(_automaton([string.encode() for string in strings]), padded, lengths)


def first_match(said: bytes, strings: Sequence[str]) -> int | None:
    """Where the stop string that begins first begins in ``said``; None where there is none."""
    found = [place for string in strings if (place := said.find(string.encode())) >= 0]
    return min(found, default=None)


def _automaton(strings: Sequence[bytes]) -> np.ndarray:
    """[S, 256] int16, the state after a byte: how much of a beginning of a string the text ends with."""
    beginnings = {string[:length]: None for string in strings for length in range(len(string))}
    states = {beginning: state for state, beginning in enumerate(beginnings)}  # b"" comes first
    matched = len(states)
    if matched >= np.iinfo(np.int16).max:
        raise InputError(f"the stop strings have {matched} bytes together: give less than 32,767")
    after = np.zeros((matched + 1, 256), np.int16)
    after[matched] = matched
    for beginning, state in states.items():
        for byte in set(b"".join(strings)):
            text = beginning + bytes([byte])
            if text.endswith(tuple(strings)):
                after[state, byte] = matched
            else:
                after[state, byte] = next(
                    states[text[i:]] for i in range(len(text) + 1) if text[i:] in states
                )
    return after


def _byte_matrix(pieces: Sequence[bytes], vocab_size: int, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of each token [V, longest] uint8, and how many there are [V]."""
    kept = [b"" if i == eos_id else piece for i, piece in enumerate(pieces[:vocab_size])]
    kept += [b""] * (vocab_size - len(kept))
    lengths = np.array([len(piece) for piece in kept])
    width = int(lengths.max(initial=0))
    whole = b"".join(piece.ljust(width, b"\0") for piece in kept)
    return np.frombuffer(whole, np.uint8).reshape(vocab_size, width), lengths


def _fold(after: np.ndarray, padded: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The automaton over bytes as one over tokens: [S, 256] -> [S, V]."""
    table = np.repeat(np.arange(len(after), dtype=np.int16)[:, None], len(lengths), axis=1)
    for place in range(padded.shape[1]):
        longer = np.flatnonzero(lengths > place)
        table[:, longer] = after[table[:, longer], padded[longer, place][None]]
    return table


def _fewest_tokens(table: np.ndarray) -> int | None:
    """How many tokens lead from the start to a match at least; None where none do."""
    matched, seen = len(table) - 1, np.zeros(len(table), bool)
    frontier, count = np.array([0]), 0
    while frontier.size:
        seen[frontier] = True
        if seen[matched]:
            return count
        reached = np.zeros(len(table), bool)
        reached[table[frontier].ravel()] = True
        frontier, count = np.flatnonzero(reached & ~seen), count + 1
    return None
