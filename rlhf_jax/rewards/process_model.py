"""A learned process reward: one logit for each step of a response; imports models, types and losses.checks.

Parameters are those of a reward model, ``{"decoder": ..., "head": {"kernel": [D], "bias": []}}``, so that a process
reward model may start from one; the head is read where steps end, not at the last token alone (Lightman et al. 2023).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.losses import checks
from rlhf_jax.models import decoder, heads
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.types import DemonstrationBatch, Rollout


def step_logits(
    config: ModelConfig, params: Any, batch: Rollout | DemonstrationBatch, step_ends: jax.typing.ArrayLike
) -> jax.Array:
    """The logit of "this step is right" for each step, [B, S] float32; its sigmoid is the step's score.

    The head sees everything up to and with the token that ends the step, and nothing after it.

    Args:
      config: of the model.
      params: of the model.
      batch: prompts with responses in the last R columns.
      step_ends: [B, S] int, response columns in [0, R), as `process.find_step_ends` gives them; entries of steps that
        are not there may hold any column, and what comes back for them means nothing.
    """
    ends = checks.integral("step_ends", step_ends)
    checks.rows("step_ends", ends, ("tokens", batch.tokens))
    hidden = decoder.hidden_states(config, params, batch.tokens, batch.token_mask)
    width = batch.response_mask.shape[1]
    at_ends = jnp.take_along_axis(hidden[:, -width:], jnp.clip(ends, 0, width - 1)[:, :, None], axis=1)
    return heads.scalar_head(params["head"], at_ends)


def column_logits(config: ModelConfig, params: Any, batch: Rollout | DemonstrationBatch) -> jax.Array:
    """`step_logits` at every response column, [B, R] float32: of the step that ends there, if one does."""
    mask = batch.response_mask
    return step_logits(config, params, batch, jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape))


def find_steps(batch: Rollout | DemonstrationBatch, marks: jax.typing.ArrayLike) -> jax.Array:
    """Where steps end, [B, R] bool: at response tokens that are marks, and at the last one of each row.

    Args:
      batch: prompts with responses in the last R columns.
      marks: [V] bool, which tokens end a step.
    """
    mask = batch.response_mask
    flags = jnp.asarray(marks)[batch.tokens[:, -mask.shape[1] :]]
    last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    return (flags & mask) | last


def step_scores(
    config: ModelConfig, params: Any, batch: Rollout | DemonstrationBatch, marks: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """(P(right) of each step at the column of the token that ends it, [B, R] float32 and 0 elsewhere; where, [B, R]).

    The pair is what the functions of `rlhf_jax.rewards.process` take, with S = R.
    """
    ends = find_steps(batch, marks)
    return jnp.where(ends, jax.nn.sigmoid(column_logits(config, params, batch)), 0.0), ends
