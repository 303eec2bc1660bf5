"""Decoding: a key/value cache, the pass that fills it, and the pass that adds one token; imports models only.

The layers are unstacked here (one dict of weights and one pair of cache arrays a layer), because a slice of a
stacked array is a copy: in a loop over tokens it would copy the whole cache and every weight once a token.
Weights are cast to the compute dtype once, before the loop.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.models import parts
from rlhf_jax.models.attention import MASKED_SCORE, causal_attention, causal_mask
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.decoder import Params, embed, unembedding

# One (key, value) a layer, each [B, J, C, K] in the compute dtype, where C is the capacity in columns.
Cache = tuple[tuple[jax.Array, jax.Array], ...]


def decoding_weights(config: ModelConfig, params: Params) -> Params:
    """The parameters as the loop wants them: a tuple of layers, the vocabulary head, all in the compute
    dtype."""
    decoder = params["decoder"]
    dtype = config.compute_dtype
    stacked = {
        name: value if name.endswith("norm") else value.astype(dtype)
        for name, value in decoder["layers"].items()
    }
    layers = tuple({name: value[i] for name, value in stacked.items()} for i in range(config.num_layers))
    return {
        "embedding": decoder["embedding"],
        "layers": layers,
        "final_norm": decoder["final_norm"],
        "head": unembedding(config, params).astype(dtype),
    }


def prefill(
    config: ModelConfig, weights: Params, tokens: jax.Array, token_mask: jax.Array, capacity: int
) -> tuple[jax.Array, Cache]:
    """Reads the prompts: [B, P] -> hidden state of the last column [B, D], and a cache of ``capacity``
    columns.

    Prompts are padded on the left, so that the last column of every row is its last token.
    """
    x = embed(config, weights["embedding"], tokens, token_mask)
    cos_sin = parts.rotation(parts.positions_from_mask(token_mask), config.head_dim, config.rope_theta)
    mask = causal_mask(token_mask)
    room = ((0, 0), (0, 0), (0, capacity - tokens.shape[1]), (0, 0))

    def attend(
        query: jax.Array, key: jax.Array, value: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        kept = tuple(jnp.pad(jnp.swapaxes(x, 1, 2), room) for x in (key, value))
        return causal_attention(query, key, value, mask), kept

    cache = []
    for layer in weights["layers"]:
        x, kept = parts.layer(config, layer, x, cos_sin, attend)
        cache.append(kept)
    return parts.rms_norm(x[:, -1], weights["final_norm"], config.norm_epsilon), tuple(cache)


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

    tokens: [B] int32. positions: [B] int32, real tokens before this one. column: [] int32. readable: [B, C]
    bool, the columns to attend to, ``column`` included.
    """
    x = embed(config, weights["embedding"], tokens[:, None], jnp.ones_like(tokens[:, None], bool))
    cos_sin = parts.rotation(positions[:, None], config.head_dim, config.rope_theta)
    updated = []
    for layer, (keys, values) in zip(weights["layers"], cache, strict=True):

        def attend(
            query: jax.Array,
            key: jax.Array,
            value: jax.Array,
            keys: jax.Array = keys,
            values: jax.Array = values,
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            keys, values = (
                jax.lax.dynamic_update_slice_in_dim(old, jnp.swapaxes(new, 1, 2), column, axis=2)
                for old, new in ((keys, key), (values, value))
            )
            return cached_attention(query, keys, values, readable), (keys, values)

        x, kept = parts.layer(config, layer, x, cos_sin, attend)
        updated.append(kept)
    return parts.rms_norm(x[:, 0], weights["final_norm"], config.norm_epsilon), tuple(updated)


def cached_attention(query: jax.Array, keys: jax.Array, values: jax.Array, readable: jax.Array) -> jax.Array:
    """One query a row against a cache: [B, 1, H, K], [B, J, C, K] twice, [B, C] -> [B, 1, H, K]."""
    batch, _, heads, head_dim = query.shape
    grouped = query.reshape(batch, keys.shape[1], -1, head_dim)
    scores = jnp.einsum("bjgk,bjck->bjgc", grouped, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(readable[:, None, None], scores * head_dim**-0.5, MASKED_SCORE)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bjgc,bjck->bjgk", weights, values).reshape(batch, 1, heads, head_dim)
