"""What a decoder layer is made of, as pure functions of arrays; imports rlhf_jax.models.config only.

Training, prefill and decoding share ``layer`` and differ in the ``attend`` they hand it: over the columns of
one batch, or over a cache. Shapes: B rows, S columns, D width, H query heads, J key/value heads, K head
width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rlhf_jax.models.config import ModelConfig

Rotation = tuple[jax.Array, jax.Array]
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]

# The matrix products of a layer outside attention that its backward pass reads again.
KEPT = ("residual", "gate", "up")


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32 (Zhang and Sennrich 2019); returns ``x``'s
    dtype."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def positions_from_mask(token_mask: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """[B, S] bool -> [B, S] int32: how many real tokens of the row (of the segment, when given) come
    before."""
    before = jnp.cumsum(token_mask, axis=1, dtype=jnp.int32) - token_mask
    if segment_ids is None:
        return before
    changes = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return before - jax.lax.cummax(jnp.where(changes, before, 0), axis=1)


def rotation(positions: jax.Array, head_dim: int, theta: float) -> Rotation:
    """[B, S] positions -> cosines and sines, each [B, S, 1, K/2] float32 (Su et al. 2021, halves as in
    Llama)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos_sin: Rotation) -> jax.Array:
    """Turns [B, S, heads, K] by its positions; pairs are (i, i + K/2)."""
    cos, sin = cos_sin
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def layer(
    config: ModelConfig, params: Mapping[str, jax.Array], x: jax.Array, cos_sin: Rotation, attend: Attend
) -> tuple[jax.Array, Any]:
    """One pre-norm layer: [B, S, D] -> [B, S, D], and whatever ``attend`` returned beside its output.

    ``attend`` takes rotated query [B, S, H, K] and key, value [B, S, J, K] and returns ([B, S, H, K],
    anything). Parameters are cast to the dtype of ``x`` where they meet it.
    """
    batch, length, _ = x.shape

    def project(inputs: jax.Array, name: str) -> jax.Array:
        # Rows and columns become one axis: with two, XLA's CPU backend transposes an operand of every weight
        # gradient, in one fusion with the elementwise work before it, at a tenth of the speed of memory.
        flat = inputs.reshape(batch * length, -1) @ params[name].astype(x.dtype)
        return flat.reshape(batch, length, -1)

    normed = rms_norm(x, params["attention_norm"], config.norm_epsilon)
    query, key, value = (
        project(normed, name).reshape(batch, length, -1, config.head_dim)
        for name in ("query", "key", "value")
    )
    mixed, kept = attend(rotate(query, cos_sin), rotate(key, cos_sin), value)
    x = checkpoint_name(x + project(mixed.reshape(batch, length, -1), "output"), "residual")
    normed = rms_norm(x, params["mlp_norm"], config.norm_epsilon)
    gate, up = (checkpoint_name(project(normed, name), name) for name in ("gate", "up"))
    return x + project(jax.nn.silu(gate) * up, "down"), kept
