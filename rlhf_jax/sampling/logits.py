"""From logits to the behaviour distribution and a draw from it, as pure functions; imports errors only.

The behaviour distribution is what tokens are really drawn from: softmax of logits / temperature, restricted
to the top-k, then to the top-p and then to the min-p tokens, renormalised. A rollout carries its
log-probabilities beside those of the whole distribution.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def top_k_mask(logits: jax.Array, k: int) -> jax.Array:
    """[..., V] -> bool: the k largest logits (Fan et al. 2018); ties with the k-th stay in."""
    return _heaviest(logits, jnp.ones(logits.shape, jnp.float32), float(min(k, logits.shape[-1])))


def top_p_mask(logits: jax.Array, p: float) -> jax.Array:
    """[..., V] -> bool: the fewest most probable tokens of total probability at least p; ties stay in.

    Nucleus sampling (Holtzman et al. 2020).
    """
    return _heaviest(logits, jax.nn.softmax(logits.astype(jnp.float32), axis=-1), p)


def min_p_mask(logits: jax.Array, p: float) -> jax.Array:
    """[..., V] -> bool: tokens at least p times as probable as the most probable one (Nguyen et al. 2024)."""
    return logits >= jnp.max(logits, axis=-1, keepdims=True) + math.log(p)


def _heaviest(logits: jax.Array, weights: jax.Array, target: float) -> jax.Array:
    """True on the largest logits, as few of them as weigh at least ``target`` together.

    The threshold is found by bisection over the bit patterns of the logits, 32 masked sums: on a CPU a sort, or
    ``top_k``, over a vocabulary of 32,000 takes twenty times as long.
    """
    bits = jax.lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.uint32)
    bits = jnp.where(logits == 0, jnp.uint32(0), bits)  # -0 equals 0
    sign = jnp.uint32(1 << 31)
    order = jnp.where(bits >= sign, ~bits, bits | sign)  # unsigned integers that compare as the floats do

    def narrow(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # those from low on weigh enough, those from high on do not
        middle = low + (high - low) // 2
        enough = jnp.sum(jnp.where(order >= middle, weights, 0.0), axis=-1, keepdims=True) >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros(logits.shape[:-1] + (1,), jnp.uint32)
    high = jnp.max(order, axis=-1, keepdims=True) + 1
    threshold, _ = jax.lax.fori_loop(0, 32, narrow, (low, high))
    return order >= threshold


def behaviour_logits(
    logits: jax.Array, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> jax.Array:
    """[..., V] -> [..., V] float32: logits / temperature, -inf where truncation leaves a token out.

    ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 leave nothing out.
    """
    scaled = logits.astype(jnp.float32) / temperature
    if 0 < top_k < logits.shape[-1]:
        scaled = jnp.where(top_k_mask(scaled, top_k), scaled, -jnp.inf)
    if top_p < 1.0:
        scaled = jnp.where(top_p_mask(scaled, top_p), scaled, -jnp.inf)
    if min_p > 0.0:
        scaled = jnp.where(min_p_mask(scaled, min_p), scaled, -jnp.inf)
    return scaled


def behaviour_log_probs(
    logits: jax.Array, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> jax.Array:
    """[..., V] -> [..., V] float32 log-probabilities of the behaviour distribution, -inf where it is 0."""
    kept = behaviour_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return kept - jax.nn.logsumexp(kept, axis=-1, keepdims=True)


def draw(keys: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One token a row from softmax(logits): keys [B], logits [B, V] -> tokens [B] int32, log-probs [B]
    float32.

    Inverse distribution function in two stages, a block of the vocabulary and a token of the block, with a
    uniform for each: two random numbers a row instead of V, and steps of 2**-46 in probability. A row's draw
    depends on its key and its logits alone.
    """
    rows, vocabulary = logits.shape
    block = max(1, round(vocabulary**0.5))
    peak = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - peak)
    padded = jnp.pad(weights, ((0, 0), (0, -vocabulary % block)))
    blocks = padded.reshape(rows, -1, block)
    totals = jnp.sum(blocks, axis=-1)
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    chosen = _inverse(totals, uniforms[:, :1])
    inside = _inverse(jnp.take_along_axis(blocks, chosen[:, None, None], axis=1)[:, 0], uniforms[:, 1:])
    tokens = chosen * block + inside
    picked = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return tokens, picked - peak[:, 0] - jnp.log(jnp.sum(totals, axis=-1))


def _inverse(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """[B, N] non-negative weights and [B, 1] uniforms in [0, 1) -> [B] int32, never an index of weight 0."""
    positive = weights > 0
    # The sum is taken at an index that can be drawn: a parallel cumulative sum need not be monotone to the
    # last bit.
    cumulative = jnp.where(positive, jnp.cumsum(weights, axis=-1), 0.0)
    threshold = uniform * jnp.max(cumulative, axis=-1, keepdims=True)
    return jnp.argmax(cumulative > threshold, axis=-1).astype(jnp.int32)
