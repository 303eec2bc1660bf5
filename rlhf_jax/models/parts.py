"""What a decoder layer is made of, as pure functions of arrays; imports rlhf_jax.models.config only.

Training, prefill and decoding share ``layer`` and differ in the ``attend`` they hand it: over the columns of
one batch, or over a cache. Shapes: B rows, S columns, D width, H query heads, J key/value heads, K head
width. Which parts a layer has, and of which kind, is what ``ModelConfig`` says; each is written once.
"""

from __future__ import annotations

import functools
import math
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

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32 (Zhang and Sennrich 2019); returns ``x``'s
    dtype."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * _along_last(scale, x)).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Layer norm over the last axis, in float32 (Ba et al. 2016); returns ``x``'s dtype."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * _along_last(scale, x) + _along_last(bias, x)).astype(x.dtype)


def norm(config: ModelConfig, params: Mapping[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
    """The norm called ``name`` in ``params``, of the model's kind, over the last axis of ``x``."""
    if config.norm == "layer":
        return layer_norm(x, _scale(config, params, name), params[f"{name}_bias"], config.norm_epsilon)
    return rms_norm(x, _scale(config, params, name), config.norm_epsilon)


def _scale(config: ModelConfig, params: Mapping[str, jax.Array], name: str) -> jax.Array:
    return 1.0 + params[name] if config.zero_centred_norms else params[name]


def _along_last(vector: jax.Array, x: jax.Array) -> jax.Array:
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))


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


def rotations(config: ModelConfig, positions: jax.Array) -> tuple[Rotation | None, ...]:
    """[B, S] positions -> the rotation of every layer; two where layers with a window have their own, theirs last.

    A rotation is cosines and sines, each [B, S, 1, rotary_dim / 2] float32; None where positions are learned.
    """
    if config.positions == "learned":
        return (None,)
    everywhere = _turned(positions, _scaled(config, _frequencies(config, config.rope_theta)))
    if config.local_rope_theta is None or not any(config.windowed):
        return (everywhere,)
    return everywhere, _turned(positions, _frequencies(config, config.local_rope_theta))


def _turned(positions: jax.Array, frequencies: jax.Array) -> Rotation:
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def _frequencies(config: ModelConfig, theta: float) -> jax.Array:
    """[rotary_dim / 2] radians a token (Su et al. 2021)."""
    return theta ** (-jnp.arange(0, config.rotary_dim, 2, dtype=jnp.float32) / config.rotary_dim)


def _scaled(config: ModelConfig, frequencies: jax.Array) -> jax.Array:
    """Frequencies for texts longer than those of pre-training: Chen et al. 2023, or Llama 3.1 (Dubey et al. 2024)."""
    if config.rope_scaling == "none":
        return frequencies
    slowed = frequencies / config.rope_factor
    if config.rope_scaling == "linear":
        return slowed
    # Full turns within the original length: few, and the frequency is slowed; many, and it stays as it is.
    turns = config.rope_original_length * frequencies / (2 * math.pi)
    low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
    stay = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return stay * frequencies + (1 - stay) * slowed


def rotate(x: jax.Array, cos_sin: Rotation | None) -> jax.Array:
    """Turns the first dimensions of [B, S, heads, K] by its positions; pairs are (i, i + rotary_dim / 2)."""
    if cos_sin is None:
        return x
    cos, sin = cos_sin
    turned = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :turned].astype(jnp.float32), 2, axis=-1)
    halves = [first * cos - second * sin, second * cos + first * sin]
    if turned == x.shape[-1]:
        return jnp.concatenate(halves, axis=-1).astype(x.dtype)
    return jnp.concatenate([*(half.astype(x.dtype) for half in halves), x[..., turned:]], axis=-1)


def project(params: Mapping[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
    """[B, S, in] -> [B, S, out] by the kernel ``name``, its bias and its low-rank addition where there are any.

    Parameters are cast to the dtype of ``x``.
    """
    batch, length, _ = x.shape
    # Rows and columns become one axis: with two, XLA's CPU backend transposes an operand of every weight
    # gradient, in one fusion with the elementwise work before it, at a tenth of the speed of memory.
    flat = x.reshape(batch * length, -1)
    out = flat @ params[name].astype(x.dtype)
    if f"{name}_lora_in" in params:
        narrow = flat @ params[f"{name}_lora_in"].astype(x.dtype)
        out += narrow @ params[f"{name}_lora_out"].astype(x.dtype)
    if f"{name}_bias" in params:
        out += params[f"{name}_bias"].astype(x.dtype)[None]
    return out.reshape(batch, length, -1)


def layer(
    config: ModelConfig,
    params: Mapping[str, jax.Array],
    x: jax.Array,
    cos_sin: Rotation | None,
    attend: Attend,
) -> tuple[jax.Array, Any]:
    """One pre-norm layer: [B, S, D] -> [B, S, D], and whatever ``attend`` returned beside its output.

    ``attend`` takes rotated query [B, S, H, K] and key, value [B, S, J, K] and returns ([B, S, H, K],
    anything).
    """
    batch, length, _ = x.shape
    normed = norm(config, params, "attention_norm", x)
    query, key, value = (
        project(params, name, normed).reshape(batch, length, -1, config.head_dim)
        for name in ("query", "key", "value")
    )
    if config.query_key_norms:
        query = rms_norm(query, _scale(config, params, "query_norm"), config.norm_epsilon)
        key = rms_norm(key, _scale(config, params, "key_norm"), config.norm_epsilon)
    mixed, kept = attend(rotate(query, cos_sin), rotate(key, cos_sin), value)
    attended = project(params, "output", mixed.reshape(batch, length, -1))
    if config.post_norms:
        attended = norm(config, params, "attention_post_norm", attended)
    after = checkpoint_name(x + attended, "residual")
    made = _mlp(config, params, norm(config, params, "mlp_norm", x if config.parallel_residual else after))
    if config.post_norms:
        made = norm(config, params, "mlp_post_norm", made)
    return after + made, kept


def _mlp(config: ModelConfig, params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """The gated (Shazeer 2020) or plain two-layer perceptron of each column: [B, S, D] -> [B, S, D]."""
    activate = _ACTIVATIONS[config.activation]
    names = ("gate", "up") if config.gated_mlp else ("up",)
    first, *rest = (checkpoint_name(project(params, name, x), name) for name in names)
    return project(params, "down", activate(first) * rest[0] if rest else activate(first))
