"""The best of n samples to each prompt; imports types and sampling.

Sample i to prompt p is row ``p * n + i`` everywhere, and its draws come from ``fold_in(key, p * n + i)`` with p the
prompt's own number: which prompts share a batch, and how wide it is, changes nothing of what is drawn.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.errors import InputError
from rlhf_jax.types import Rollout


def repeat_prompts(
    tokens: jax.Array, token_mask: jax.Array, n: int, *, prompt_ids: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What ``generate`` takes for n samples to each of B prompts: tokens and token_mask [B n, P], row_ids [B n] int32.

    prompt_ids: [B] int32, the prompts' own numbers; None is 0 to B - 1.

    Raises:
        InputError: n is below 1.
    """
    if n < 1:
        raise InputError(f"best of {n} was asked for: give n of at least 1")
    numbers = jnp.arange(tokens.shape[0], dtype=jnp.int32) if prompt_ids is None else prompt_ids
    row_ids = (numbers[:, None] * n + jnp.arange(n, dtype=jnp.int32)[None]).reshape(-1)
    return jnp.repeat(tokens, n, axis=0), jnp.repeat(token_mask, n, axis=0), row_ids


def select_best(rollout: Rollout, scores: jax.Array, n: int) -> tuple[Rollout, jax.Array]:
    """Of each n rows in turn the one with the highest score, the first where they tie; with its score, [B] float32.

    rollout: of B n rows. scores: [B n] float. A score of NaN is never the best, unless all n are.

    The log-probs of what is returned are those of the policy that was sampled, not of best-of-n.

    Raises:
        InputError: the rows are no multiple of n, or there is not one score a row.
    """
    rows = rollout.tokens.shape[0]
    if n < 1 or rows % n or scores.shape != (rows,):
        raise InputError(
            f"best of {n} was asked for with {rows} rows and scores of shape {list(scores.shape)}: give n rows a "
            "prompt, one after another, and one score a row"
        )
    groups = scores.astype(jnp.float32).reshape(-1, n)
    # NaN is below -inf: the best of what is a number, or the first where nothing is.
    lowest = jnp.where(jnp.isnan(groups), -jnp.inf, groups)
    best = jnp.argmax(lowest, axis=1)
    first_number = jnp.argmax(~jnp.isnan(groups), axis=1)
    best = jnp.where(jnp.max(lowest, axis=1) == -jnp.inf, first_number, best)
    chosen = jnp.arange(rows // n) * n + best
    # policy_step is one number for all rows.
    kept = jax.tree.map(lambda x: x[chosen] if x.ndim else x, rollout)
    return kept, groups.reshape(-1)[chosen]
