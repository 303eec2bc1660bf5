"""Prompts of any length as arrays of few widths, so that little is compiled; imports errors and NumPy only.

A compiled sampler serves one width P of prompts. Widths are therefore taken from a fixed, sparse ladder: 16, 24, 32,
48, 64, 96 and so on, two to an octave, of which padding fills less than a half and in the mean a fifth. A row's sample
does not depend on the width it was padded to.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_jax.errors import InputError

_SMALLEST = 16


def bucket_width(longest: int, *, limit: int) -> int:
    """The least width of the ladder that holds ``longest`` tokens, or ``limit`` where that is less.

    limit: what the context leaves beside the response.

    Raises:
        InputError: ``longest`` is beyond ``limit``, or below 1.
    """
    if longest < 1:
        raise InputError("a prompt has no tokens: give at least one to go on from")
    if longest > limit:
        raise InputError(
            f"a prompt has {longest} tokens and the context has room for {max(limit, 0)} beside the response: "
            "shorten it, or lower max_new_tokens"
        )
    width = _SMALLEST
    while width < longest:
        # 16, 24, 32, 48, 64: a power of two, then one and a half of it
        width = width * 3 // 2 if width & (width - 1) == 0 else width * 4 // 3
    return min(width, limit)


def pad_prompts(
    prompts: Sequence[Sequence[int]], *, width: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [B, width] int32, token_mask [B, width] bool): ids on the right, padding on the left.

    Raises:
        InputError: a prompt is empty or longer than ``width``; the message says which.
    """
    tokens = np.full((len(prompts), width), pad_id, np.int32)
    lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= width:
            raise InputError(f"prompt {row} has {len(prompt)} tokens: give 1 to {width}")
        tokens[row, width - len(prompt) :] = prompt
    return tokens, np.arange(width)[None] >= width - lengths[:, None]
