"""Causal grouped-query attention over the columns of one batch, with its own backward pass; imports jax only.

The [S, S] weights are never kept: the backward pass computes them again from the scores and the log-normaliser
(Dao et al. 2022), and blocks of keys that a block of queries may not see are skipped in both directions. What is kept
carries the names in ``KEPT``, for a rematerialisation policy to find.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

KEPT = ("attention_inputs", "attention_output", "attention_normaliser")

# Far below any real score and still finite, so that a row with nothing to attend to stays finite.
MASKED_SCORE = -1e30

# Queries go in blocks of at least this many columns, and in at most this many blocks.
_SMALLEST_BLOCK, _MOST_BLOCKS = 64, 4

_Kept = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def causal_mask(
    token_mask: jax.Array, segment_ids: jax.Array | None = None, *, window: int | None = None
) -> jax.Array:
    """[B, S] -> [B, S, S] bool: query column, key column; a key is real, not later, and of the same segment.

    With a window it is also one of the last ``window`` real tokens, the query's own included (Beltagy et al. 2020).
    """
    columns = jnp.arange(token_mask.shape[1])
    mask = (columns[None, :] <= columns[:, None])[None] & token_mask[:, None, :]
    if segment_ids is not None:
        mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
    if window is not None:
        count = jnp.cumsum(token_mask, axis=1, dtype=jnp.int32)
        mask &= count[:, :, None] - count[:, None, :] < window
    return mask


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Softmax attention where H/J query heads read one key/value head, which is never repeated in memory.

    query: [B, S, H, K]. key, value: [B, S, J, K]. mask: [B, S, S] bool from ``causal_mask``: False wherever the key
    column is after the query column, which is what lets blocks be skipped. scale: of the products; None is 1/sqrt(K).
    softcap: scores s become softcap * tanh(s / softcap) (Gemma Team 2024). Returns [B, S, H, K]. Scores, softmax and
    their gradients are float32 (Ainslie et al. 2023). Query columns that see no key give something finite, and
    pass no gradient on.
    """
    return _attention(query, key, value, mask, query.shape[-1] ** -0.5 if scale is None else scale, softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, scale: float, softcap: float | None
) -> jax.Array:
    return _forward(query, key, value, mask, scale, softcap)[0]


def capped(scores: jax.Array, softcap: float | None) -> jax.Array:
    """softcap * tanh(scores / softcap), or the scores as they are."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _blocks(length: int) -> list[tuple[int, int]]:
    size = -(-length // min(_MOST_BLOCKS, max(1, length // _SMALLEST_BLOCK)))
    return [(start, min(length, start + size)) for start in range(0, length, size)]


def _product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _split_heads(query: jax.Array, kv_heads: int) -> jax.Array:
    """[B, S, H, K] -> [B, J, G, S, K]."""
    batch, length, heads, head_dim = query.shape
    return query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)


def _join_heads(x: jax.Array) -> jax.Array:
    """[B, J, G, S, K] -> [B, S, H, K]."""
    batch, kv_heads, groups, length, head_dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * groups, head_dim)


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, scale: float, softcap: float | None
) -> tuple[jax.Array, _Kept]:
    name_inputs = functools.partial(checkpoint_name, name="attention_inputs")
    query = name_inputs(_split_heads(query, key.shape[2]))
    key, value = (name_inputs(jnp.swapaxes(x, 1, 2)) for x in (key, value))
    outputs, normalisers = [], []
    for start, stop in _blocks(mask.shape[1]):
        scores = _product("bjgsk,bjtk->bjgst", query[:, :, :, start:stop], key[:, :, :stop])
        scores = capped(scores * scale, softcap)
        scores = jnp.where(mask[:, None, None, start:stop, :stop], scores, MASKED_SCORE)
        peak = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - peak)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = _product("bjgst,bjtk->bjgsk", weights.astype(value.dtype), value[:, :, :stop])
        outputs.append((mixed / total).astype(value.dtype))
        normalisers.append(peak + jnp.log(total))
    output = checkpoint_name(jnp.concatenate(outputs, axis=3), "attention_output")
    normaliser = checkpoint_name(jnp.concatenate(normalisers, axis=3), "attention_normaliser")
    return _join_heads(output), (query, key, value, output, normaliser, mask)


def _backward(
    scale: float, softcap: float | None, kept: _Kept, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    query, key, value, output, normaliser, mask = kept
    gradient = _split_heads(gradient, key.shape[1])
    # sum_t w_st dw_st, which the gradient of the softmax subtracts, is the output times its gradient.
    shared = jnp.sum(gradient.astype(jnp.float32) * output.astype(jnp.float32), axis=-1, keepdims=True)
    query_parts, key_gradient, value_gradient = [], None, None
    for start, stop in reversed(_blocks(mask.shape[1])):
        queries, gradients = query[:, :, :, start:stop], gradient[:, :, :, start:stop]
        scores = _product("bjgsk,bjtk->bjgst", queries, key[:, :, :stop])
        scores = capped(scores * scale, softcap)
        shifted = scores - normaliser[:, :, :, start:stop]
        weights = jnp.exp(jnp.where(mask[:, None, None, start:stop, :stop], shifted, MASKED_SCORE))
        inner = _product("bjgsk,bjtk->bjgst", gradients, value[:, :, :stop])
        inner = weights * (inner - shared[:, :, :, start:stop]) * scale
        if softcap is not None:  # the slope of the cap, which its own value gives
            inner *= 1 - jnp.square(scores / softcap)
        inner = inner.astype(key.dtype)
        query_parts.append(_product("bjgst,bjtk->bjgsk", inner, key[:, :, :stop]))
        block_key = _product("bjgst,bjgsk->bjtk", inner, queries)
        block_value = _product("bjgst,bjgsk->bjtk", weights.astype(value.dtype), gradients)
        if key_gradient is None:  # the last queries see every key
            key_gradient, value_gradient = block_key, block_value
        else:
            key_gradient = key_gradient.at[:, :, :stop].add(block_key)
            value_gradient = value_gradient.at[:, :, :stop].add(block_value)
    query_gradient = _join_heads(jnp.concatenate(query_parts[::-1], axis=3)).astype(query.dtype)
    key_gradient = jnp.swapaxes(key_gradient, 1, 2).astype(key.dtype)
    value_gradient = jnp.swapaxes(value_gradient, 1, 2).astype(value.dtype)
    return query_gradient, key_gradient, value_gradient, None


_attention.defvjp(_forward, _backward)
