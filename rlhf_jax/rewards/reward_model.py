"""A learned scalar reward: scoring rollouts, and replacing the score of what never ended. Imports models and types."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models import decoder, heads
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.types import DemonstrationBatch, Rollout


def score(
    config: ModelConfig, params: Any, batch: Rollout | DemonstrationBatch, *, offset: jax.Array | float = 0.0
) -> jax.Array:
    """The reward of each row, [B] float32: the head at the last real token (EOS when there is one), minus ``offset``.

    ``offset`` is the mean reward of reference responses, so that 0 means "as good as those" (Huang et al. 2024).
    """
    hidden = decoder.hidden_states(config, params, batch.tokens, batch.token_mask)
    return heads.last_token_values(heads.scalar_head(params["head"], hidden), batch.token_mask) - offset


def init_heads(config: ModelConfig, key: jax.Array, *, number: int) -> Any:
    """The heads of ``number`` objectives on one trunk, stacked: every array has a leading axis [K]."""
    return jax.vmap(lambda key: heads.init_scalar_head(config, key))(jax.random.split(key, number))


def score_by_objectives(
    config: ModelConfig,
    params: Any,
    batch: Rollout | DemonstrationBatch,
    *,
    offsets: jax.Array | float = 0.0,
) -> jax.Array:
    """The reward of each row by each of K heads on one trunk, [K, B] float32, minus the head's offset ([K]); `score`.

    ``params`` are those of a reward model whose head is of `init_heads`.
    """
    hidden = decoder.hidden_states(config, params, batch.tokens, batch.token_mask)
    scores = jax.vmap(
        lambda head: heads.last_token_values(heads.scalar_head(head, hidden), batch.token_mask)
    )(params["head"])
    return scores - jnp.broadcast_to(jnp.asarray(offsets, jnp.float32), scores.shape[:1])[:, None]


def replace_unfinished(
    scores: jax.Array, terminated: jax.Array, missing_eos_score: float | None
) -> jax.Array:
    """``missing_eos_score`` in place of the scores [B] of rows that length cut off; None keeps every score."""
    if missing_eos_score is None:
        return scores
    return jnp.where(terminated, scores, jnp.float32(missing_eos_score))
