"""Tokenizers: loading, identity, and text to ids and back; imports transformers and errors.

A prompt and its response are tokenised together and divided by character offsets, so that training sees
exactly the tokens that the joined text has. A token that straddles the boundary belongs to the response.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
from collections.abc import Sequence

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_jax.errors import InputError


def load_tokenizer(path: str | pathlib.Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a local Hugging Face directory; nothing is downloaded, no code of it is run.

    Raises `InputError` where the directory or its tokenizer is missing or broken, where the tokenizer
    cannot report character offsets, and where it has no end-of-sequence token.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise InputError(
            f"{path} is not a directory: give a Hugging Face directory that holds a tokenizer.json."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many kinds, the latter a bare Exception
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path} holds no tokenizer that can be loaded ({reason}): add the model's tokenizer.json and "
            "tokenizer_config.json."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(
            f"the tokenizer of {path} reports no character offsets: convert it to a tokenizer.json first."
        )
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {path} has no eos_token: name one in its tokenizer_config.json.")
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, path: str | pathlib.Path) -> None:
    """Writes the directory that `load_tokenizer` reads."""
    tokenizer.save_pretrained(str(path))


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256, in hex, of what decides the ids: vocabulary, merges, special tokens; stable between runs."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    content = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "merges": [list(m) if isinstance(m, list) else m.split(" ", 1) for m in model.get("merges", ())],
        "special": {
            name: tokenizer.convert_tokens_to_ids(token)
            for name, token in sorted(tokenizer.special_tokens_map.items())
            if isinstance(token, str)
        },
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, vocab_size: int, *, model: str) -> None:
    """Raises `InputError` if the tokenizer has an id that a model with ``vocab_size`` embeddings does not."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer has ids up to {largest} and {model} has a vocabulary of {vocab_size}: "
            "give the tokenizer that the model was trained with."
        )


def eos_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id that ends a response."""
    return int(tokenizer.eos_token_id)


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id written into padding: EOS stands in where the tokenizer has none, as masks come from lengths."""
    return eos_id(tokenizer) if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def tokens_with(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    """Which ids decode to something that has ``text`` in it, [V] bool.

    Raises:
      InputError: none has, so that no token tells where ``text`` stands.
    """
    ids = range(max(tokenizer.get_vocab().values()) + 1)
    found = np.array([bool(text) and text in _text(tokenizer, [i]) for i in ids])
    if not found.any():
        raise InputError(
            f"the tokenizer has no token with {text!r} in it, so that none marks the end of a step: give another "
            "--config.step_mark"
        )
    return found


def join(prompt: str, response: str) -> str:
    """The text that is tokenised: one blank between the two, unless there is white space already."""
    return prompt + _separator(prompt, response) + response


def _separator(prompt: str, response: str) -> str:
    spaced = not prompt or prompt[-1].isspace() or response[:1].isspace()
    return "" if spaced else " "


def encode(tokenizer: PreTrainedTokenizerFast, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """(prompt ids, response ids) of the joined text: BOS first where there is one, EOS always last."""
    return encode_many(tokenizer, [(prompt, response)])[0]


def encode_many(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """`encode` of many (prompt, response) pairs at once, which is several times as fast."""
    if not pairs:
        return []
    texts = [join(prompt, response) for prompt, response in pairs]
    encoding = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    divided = []
    for (prompt, _), ids, offsets in zip(
        pairs, encoding["input_ids"], encoding["offset_mapping"], strict=True
    ):
        boundary = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
        divided.append((_with_bos(tokenizer, ids[:boundary]), [*ids[boundary:], eos_id(tokenizer)]))
    return divided


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """The ids to sample a response from; those of `encode` unless a token straddles the boundary there."""
    return _with_bos(tokenizer, tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])


def _with_bos(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[int]:
    return list(ids) if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id), *ids]


def decode(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The text of ids without padding: a first BOS and one last EOS are dropped.

    Special tokens in between were said, so they stay visible: a policy cannot hide <pad> or <unk> from a
    reader or from a reward that looks at text.
    """
    ids = [int(i) for i in ids]
    if ids and ids[0] == tokenizer.bos_token_id:
        ids = ids[1:]
    return _text(tokenizer, ids)


def decode_rows(tokenizer: PreTrainedTokenizerFast, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """The text of each response in ``tokens`` [B, T] where ``mask`` [B, T] is True; one last EOS is dropped.

    A BOS at its start was said by the policy, so that it stays visible.
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask, bool)
    return [_text(tokenizer, row[kept].tolist()) for row, kept in zip(tokens, mask, strict=True)]


def _text(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """What each id adds to the text of the ids before it, as UTF-8; joined, they are the text of a continuation.

    A token may hold part of a character. What a tokenizer does at the start of a text only (some drop one
    blank there) is not done here. Ids that the tokenizer does not have add nothing.
    """
    backend = tokenizer.backend_tokenizer
    decoder = json.dumps(json.loads(backend.to_str())["decoder"])
    words = {i: word for word, i in tokenizer.get_vocab().items()}
    ids = range(max(words) + 1)
    if '"ByteLevel"' in decoder:
        return [_of_byte_level(words.get(i, "")) for i in ids]
    once, twice = (
        backend.decode_batch([[i] * times if i in words else [] for i in ids], skip_special_tokens=False)
        for times in (1, 2)
    )
    pieces = [both[len(one) :].encode() for one, both in zip(once, twice, strict=True)]
    if '"ByteFallback"' in decoder:
        for i, word in words.items():
            if re.fullmatch("<0x[0-9A-F]{2}>", word):
                pieces[i] = bytes([int(word[3:5], 16)])
    return pieces


def _of_byte_level(word: str) -> bytes:
    """A word of a byte-level vocabulary as bytes; one with other characters (a special token) is text."""
    if all(character in _BYTES for character in word):
        return bytes(_BYTES[character] for character in word)
    return word.encode()


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte (GPT-2's choice): itself where it can be seen, else one from 256 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()
