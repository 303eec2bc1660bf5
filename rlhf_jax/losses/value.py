"""The critic's losses; imports jax, masking and checks only."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.losses import checks
from rlhf_jax.masking import elementwise

__all__ = ["clipped_value_loss", "value_loss"]


def value_loss(values: jax.typing.ArrayLike, returns: jax.typing.ArrayLike) -> jax.Array:
    """Half the squared distance to the return.

    (V - R)^2 / 2: the V part of Schulman et al. (2017), eq. 9, with the half that makes its gradient the
    error.

    Args:
      values: [B, T] float, the critic's estimate before each token.
      returns: [B, T] float; held constant.

    Returns:
      [B, T] float32, reward squared.

    Raises:
      TypeError: an argument is not floating.
      ValueError: wrong rank, or shapes that differ.

    >>> value_loss(jnp.array([[1.0]]), jnp.array([[3.0]]))
    Array([[2.]], dtype=float32)
    """
    values = checks.floating("values", values, "B T")
    returns = jax.lax.stop_gradient(checks.floating("returns", returns, like=("values", values)))
    return elementwise(lambda value, target: 0.5 * jnp.square(value - target), values, returns)


def clipped_value_loss(
    values: jax.typing.ArrayLike,
    old_values: jax.typing.ArrayLike,
    returns: jax.typing.ArrayLike,
    *,
    clip: float | jax.Array = 0.2,
) -> jax.Array:
    """`value_loss` with no reward for moving more than ``clip`` away from the old estimate.

    max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2: the value clip of OpenAI Baselines' PPO,
    as Ziegler et al. (2019) and Stiennon et al. (2020) train with it.

    Args:
      values: [B, T] float, the critic's estimate before each token.
      old_values: [B, T] float, the estimates at sampling time; held constant.
      returns: [B, T] float; held constant.
      clip: in units of reward, above 0.

    Returns:
      [B, T] float32, reward squared.

    Raises:
      TypeError: an array is not floating.
      ValueError: wrong rank, shapes that differ, or ``clip`` not above 0.

    >>> clipped_value_loss(jnp.array([[1.0]]), jnp.array([[0.0]]), jnp.array([[1.0]]), clip=0.25)
    Array([[0.28125]], dtype=float32)
    """
    values = checks.floating("values", values, "B T")
    old_values = checks.floating("old_values", old_values, like=("values", values))
    returns = checks.floating("returns", returns, like=("values", values))
    checks.positive("clip", clip)

    def loss(value: jax.Array, old: jax.Array, target: jax.Array) -> jax.Array:
        near = old + jnp.clip(value - old, -clip, clip)
        return 0.5 * jnp.maximum(jnp.square(value - target), jnp.square(near - target))

    return elementwise(loss, values, *jax.lax.stop_gradient((old_values, returns)))
