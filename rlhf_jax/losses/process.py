"""The loss of a process reward model, which judges every step of a solution; imports jax and checks only."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.losses import checks

__all__ = ["process_reward_loss"]


def process_reward_loss(
    step_logits: jax.typing.ArrayLike, step_labels: jax.typing.ArrayLike, step_mask: jax.typing.ArrayLike
) -> jax.Array:
    """Cross-entropy of "this step is right", one logit a step.

    -(l log sigmoid(z) + (1 - l) log(1 - sigmoid(z))): Wang et al. (2024, Math-Shepherd), eq. 2; Lightman et
    al. (2023) with two classes.

    Args:
      step_logits: [B, S] float, z, read at the last token of each step.
      step_labels: [B, S] bool, int or float in [0, 1], l: whether the step is right, or how often its
        continuations were (soft estimation). Held constant.
      step_mask: [B, S] bool, True where there is a labelled step.

    Returns:
      [B, S] float32, nats a step, 0 where masked out.

    Raises:
      TypeError: ``step_logits`` is not floating or ``step_mask`` not boolean.
      ValueError: wrong rank, or shapes that differ.

    >>> labels, mask = jnp.array([[1, 0, 1]]), jnp.array([[True, True, False]])
    >>> process_reward_loss(jnp.array([[0.0, 1.0, 5.0]]), labels, mask)
    Array([[0.693..., 1.313..., 0. ...]], dtype=float32)
    """
    logits = checks.floating("step_logits", step_logits, "B S")
    mask = checks.boolean("step_mask", step_mask, ("step_logits", logits))
    labels = jnp.asarray(step_labels).astype(logits.dtype)
    labels = jax.lax.stop_gradient(checks.floating("step_labels", labels, like=("step_logits", logits)))
    logits, labels = jnp.where(mask, logits, 0.0), jnp.where(mask, labels, 0.0)
    return jnp.where(mask, jax.nn.softplus(logits) - labels * logits, 0.0)
