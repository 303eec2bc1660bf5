"""Decoding: a key/value cache, the pass that fills it, and the pass that adds one token; imports models only.

The layers are unstacked here (one dict of weights and one pair of cache arrays a layer), because a slice of a
stacked array is a copy: in a loop over tokens it would copy the whole cache and every weight once a token.
Weights are cast to the compute dtype once, before the loop.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models import parts
from rlhf_jax.models.attention import MASKED_SCORE, capped, causal_attention, causal_mask
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.decoder import Params, embed, unembedding

# One (key, value) a layer, each [B, J, C, K] in the dtype that ``prefill`` was given; C is the capacity in columns.
Cache = tuple[tuple[jax.Array, jax.Array], ...]


def decoding_weights(config: ModelConfig, params: Params) -> Params:
    """The parameters as the loop wants them: a tuple of layers, the vocabulary head, all in the compute
    dtype."""
    decoder = params["decoder"]
    dtype = config.compute_dtype
    stacked = {
        name: value if "norm" in name else value.astype(dtype) for name, value in decoder["layers"].items()
    }
    layers = tuple({name: value[i] for name, value in stacked.items()} for i in range(config.num_layers))
    top = {name: value for name, value in decoder.items() if name not in ("layers", "unembedding")}
    return {
        **top,
        "layers": layers,
        "head": unembedding(config, params).astype(dtype),
    }


def prefill(
    config: ModelConfig,
    weights: Params,
    tokens: jax.Array,
    token_mask: jax.Array,
    capacity: int,
    dtype: Any = None,
) -> tuple[jax.Array, Cache]:
    """Reads the prompts: [B, P] -> hidden state of the last column [B, D], and a cache of ``capacity``
    columns.

    Prompts are padded on the left, so that the last column of every row is its last token. ``dtype``: of the
    cache; None is the compute dtype.
    """
    positions = parts.positions_from_mask(token_mask)
    x = embed(config, weights, tokens, token_mask, positions)
    rotations = parts.rotations(config, positions)
    room = ((0, 0), (0, 0), (0, capacity - tokens.shape[1]), (0, 0))

    masks = {window: causal_mask(token_mask, window=window) for window in set(_windows(config))}

    def attend(
        query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        kept = tuple(jnp.pad(jnp.swapaxes(x, 1, 2), room).astype(dtype or x.dtype) for x in (key, value))
        mixed = causal_attention(
            query, key, value, mask, scale=config.score_scale, softcap=config.attention_softcap
        )
        return mixed, kept

    cache = []
    for layer, window in zip(weights["layers"], _windows(config), strict=True):
        own = functools.partial(attend, mask=masks[window])
        x, kept = parts.layer(config, layer, x, _rotation(rotations, window), own)
        cache.append(kept)
    return parts.norm(config, weights, "final_norm", x[:, -1]), tuple(cache)


def _windows(config: ModelConfig) -> tuple[int | None, ...]:
    """The window of each layer."""
    return tuple(config.window if windowed else None for windowed in config.windowed)


def _rotation(rotations: tuple[parts.Rotation | None, ...], window: int | None) -> parts.Rotation | None:
    """The rotation of a layer: layers with a window have the last, see ``parts.rotations``."""
    return rotations[0] if window is None else rotations[-1]


def decode_step(
    config: ModelConfig,
    weights: Params,
    cache: Cache,
    tokens: jax.Array,
    positions: jax.Array,
    column: jax.Array,
    readable: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Adds one token a row: its hidden state [B, D] and the cache with its keys and values at ``column``.

    tokens: [B] int32. positions: [B] int32, real tokens before this one. column: [] int32, or [B] where rows
    are not equally far. readable: [B, C] bool, the columns to attend to, ``column`` included.
    """
    x = embed(config, weights, tokens[:, None], jnp.ones_like(tokens[:, None], bool), positions[:, None])
    rotations = parts.rotations(config, positions[:, None])
    # How many of the tokens a row may read come after each column: the nearest so many are in a window.
    count = jnp.cumsum(readable, axis=1, dtype=jnp.int32)
    after = count[:, -1:] - count
    seen = {
        window: readable if window is None else readable & (after < window)
        for window in set(_windows(config))
    }
    updated = []
    for layer, window, (keys, values) in zip(weights["layers"], _windows(config), cache, strict=True):

        def attend(
            query: jax.Array,
            key: jax.Array,
            value: jax.Array,
            keys: jax.Array = keys,
            values: jax.Array = values,
            seen: jax.Array = seen[window],
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            keys, values = (
                _put(old, jnp.swapaxes(new, 1, 2).astype(old.dtype), column)
                for old, new in ((keys, key), (values, value))
            )
            mixed = cached_attention(
                query, keys, values, seen, scale=config.score_scale, softcap=config.attention_softcap
            )
            return mixed, (keys, values)

        x, kept = parts.layer(config, layer, x, _rotation(rotations, window), attend)
        updated.append(kept)
    return parts.norm(config, weights, "final_norm", x[:, 0]), tuple(updated)


def _put(old: jax.Array, new: jax.Array, column: jax.Array) -> jax.Array:
    """[B, J, C, K] with [B, J, 1, K] at ``column``."""
    if column.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(old, new, column, axis=2)
    return jax.vmap(lambda o, n, c: jax.lax.dynamic_update_slice_in_dim(o, n, c, axis=1))(old, new, column)


def cached_attention(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    readable: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """One query a row against a cache: [B, 1, H, K], [B, J, C, K] twice, [B, C] -> [B, 1, H, K].

    A cache of another dtype than the query is read in the wider of the two.
    scale, softcap: as of ``attention.causal_attention``.
    """
    batch, _, heads, head_dim = query.shape
    grouped = query.reshape(batch, keys.shape[1], -1, head_dim)
    scores = jnp.einsum("bjgk,bjck->bjgc", grouped, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(readable[:, None, None], capped(scores * scale, softcap), MASKED_SCORE)
    weights = jax.nn.softmax(scores, axis=-1).astype(jnp.promote_types(query.dtype, values.dtype))
    mixed = jnp.einsum("bjgc,bjck->bjgk", weights, values)
    return mixed.astype(query.dtype).reshape(batch, 1, heads, head_dim)
