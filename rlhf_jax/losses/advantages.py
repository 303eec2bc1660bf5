"""How much better than expected: advantages from rewards; imports jax and checks only.

Advantages and returns are constants of every objective that uses them, so no gradient passes through here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.losses import checks

__all__ = ["generalized_advantage_estimation", "group_relative_advantages", "leave_one_out_advantages"]


def generalized_advantage_estimation(
    rewards: jax.typing.ArrayLike,
    values: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    gamma: float | jax.Array,
    lam: float | jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Exponentially weighted sums of temporal-difference errors: lam trades the critic's bias for variance.

    A_t = sum_l (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t: Schulman et al. (2016), eq.
    16; the value after the last token is 0. Masked tokens are skipped: the next unmasked one is t + 1.
    Nothing is differentiable.

    Args:
      rewards: [B, T] float, the reward for emitting token t.
      values: [B, T] float, V_t, the critic's estimate *before* token t is emitted.
      mask: [B, T] bool, True on response tokens; may have holes.
      gamma: discount in [0, 1]; 1 for language.
      lam: lambda in [0, 1]; 0.95 is usual, 1 is the Monte-Carlo return less the value.

    Returns:
      advantages: [B, T] float32, 0 where masked out.
      returns: [B, T] float32, advantages + values, what the critic should have said; 0 where masked out.

    Raises:
      TypeError: ``rewards`` or ``values`` is not floating, or ``mask`` not boolean.
      ValueError: wrong rank, shapes that differ, or ``gamma`` or ``lam`` outside [0, 1].

    >>> rewards, values, mask = jnp.array([[0.0, 5.0]]), jnp.array([[1.0, 2.0]]), jnp.ones((1, 2), bool)
    >>> generalized_advantage_estimation(rewards, values, mask, gamma=1.0, lam=0.5)
    (Array([[2.5, 3. ]], dtype=float32), Array([[3.5, 5. ]], dtype=float32))
    """
    rewards = checks.floating("rewards", rewards, "B T")
    values = checks.floating("values", values, like=("rewards", rewards))
    mask = checks.boolean("mask", mask, ("rewards", rewards))
    checks.fraction("gamma", gamma)
    checks.fraction("lam", lam)
    rewards, values = jnp.where(mask, rewards, 0.0), jnp.where(mask, values, 0.0)

    def backward(carry: tuple[jax.Array, jax.Array], step: tuple[jax.Array, jax.Array, jax.Array]):
        next_advantage, next_value = carry
        reward, value, here = step
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = jnp.where(here, advantage, next_advantage), jnp.where(here, value, next_value)
        return carry, jnp.where(here, advantage, 0.0)

    nothing = (
        jnp.zeros_like(rewards[:, 0]) if rewards.shape[1] else jnp.zeros(rewards.shape[:1], rewards.dtype)
    )
    _, advantages = jax.lax.scan(backward, (nothing, nothing), (rewards.T, values.T, mask.T), reverse=True)
    return jax.lax.stop_gradient((advantages.T, advantages.T + values))


def group_relative_advantages(
    rewards: jax.typing.ArrayLike, *, scale: bool = True, epsilon: float = 1e-4
) -> jax.Array:
    """Each response against the others to its prompt: centred on the group, in units of its spread.

    (r_i - mean(r)) / (std(r) + epsilon), std over G - 1: Shao et al. (2024), section 4.1.2. With
    ``scale=False`` the division is left out, which is Liu et al. (2025)'s Dr. GRPO. Nothing is
    differentiable.

    Args:
      rewards: [N, G] float, the rewards of the G responses to each of N prompts.
      scale: whether to divide by the standard deviation.
      epsilon: added to the standard deviation, above 0; TRL's 1e-4 by default.

    Returns:
      [N, G] float32. A group whose rewards are all equal, or a group of one, gives exactly 0.

    Raises:
      TypeError: ``rewards`` is not floating.
      ValueError: wrong rank, or ``epsilon`` not above 0.

    >>> group_relative_advantages(jnp.array([[1.0, 2.0, 3.0]]))
    Array([[-0.9999...,  0. ...,  0.9999...]], dtype=float32)
    """
    rewards = checks.floating("rewards", rewards, "N G")
    checks.positive("epsilon", epsilon)
    size = rewards.shape[1]
    centred = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    if scale:
        variance = jnp.sum(jnp.square(centred), axis=1, keepdims=True) / max(size - 1, 1)
        centred = centred / (jnp.sqrt(variance) + epsilon)
    return jax.lax.stop_gradient(jnp.where(_has_spread(rewards), centred, 0.0))


def leave_one_out_advantages(rewards: jax.typing.ArrayLike) -> jax.Array:
    """Each response against the mean of the *other* responses to its prompt: an unbiased baseline (RLOO).

    r_i - (1 / (G - 1)) sum_{j != i} r_j: Kool, van Hoof & Welling (2019); Ahmadian et al. (2024). Nothing is
    differentiable.

    Args:
      rewards: [N, G] float, the rewards of the G responses to each of N prompts.

    Returns:
      [N, G] float32. A group whose rewards are all equal, or a group of one, gives exactly 0.

    Raises:
      TypeError: ``rewards`` is not floating.
      ValueError: wrong rank.

    >>> leave_one_out_advantages(jnp.array([[1.0, 2.0, 6.0]]))
    Array([[-3. , -1.5,  4.5]], dtype=float32)
    """
    rewards = checks.floating("rewards", rewards, "N G")
    size = rewards.shape[1]
    advantages = (rewards - jnp.mean(rewards, axis=1, keepdims=True)) * (size / max(size - 1, 1))
    return jax.lax.stop_gradient(jnp.where(_has_spread(rewards), advantages, 0.0))


def _has_spread(rewards: jax.Array) -> jax.Array:
    """[N, 1] bool; equal rewards may differ from their rounded mean, so 0 has to be said, not computed."""
    return jnp.any(rewards != rewards[:, :1], axis=1, keepdims=True)
