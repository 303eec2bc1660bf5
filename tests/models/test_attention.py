"""Oracle: attention one query at a time in float64, and its gradient by central differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.attention import causal_attention, causal_mask


def oracle(query, key, value, readable, scale=0.5, softcap=np.inf):
    batch, length, heads, _ = query.shape
    groups = heads // key.shape[2]
    out = np.zeros_like(query)
    for b in range(batch):
        for s in range(length):
            seen = [t for t in range(length) if readable(b, s, t)]
            for h in range(heads if seen else 0):
                scores = np.array([query[b, s, h] @ key[b, t, h // groups] for t in seen]) * scale
                if np.isfinite(softcap):
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[b, s, h] = sum(w * value[b, t, h // groups] for w, t in zip(weights, seen, strict=True))
    return out


def inputs(length, seed=0):
    rng = np.random.default_rng(seed)
    query, key, value = (rng.normal(size=(2, length, heads, 4)) for heads in (4, 2, 2))
    token_mask = np.ones((2, length), bool)
    token_mask[1, :3] = False
    segments = np.where(np.arange(length) < length // 2, 1, 2)[None].repeat(2, 0)
    return query, key, value, token_mask, segments


# 9 columns are one block of queries; 130 are two of 65, so that a block boundary is crossed.
@pytest.mark.parametrize(
    ("length", "window", "options"),
    [(9, None, {}), (130, None, {}), (130, 40, {"scale": 0.9, "softcap": 1.5})],
)
def test_value_and_gradient_against_loops(length, window, options):
    query, key, value, token_mask, segments = inputs(length)
    if window is not None:
        token_mask[0, 50:60] = False  # a window counts tokens, not columns

    def readable(b, s, t):
        near = window is None or token_mask[b, t + 1 : s + 1].sum() < window
        return t <= s and near and token_mask[b, t] and segments[b, s] == segments[b, t]

    real = token_mask[:, :, None, None]
    expected = np.where(real, oracle(query, key, value, readable, **options), 0)
    mask = causal_mask(jnp.asarray(token_mask), jnp.asarray(segments), window=window)
    arrays = [jnp.asarray(x, jnp.float32) for x in (query, key, value)]
    actual = causal_attention(*arrays, mask, **options)
    np.testing.assert_allclose(np.where(real, actual, 0), expected, atol=2e-6)

    cotangent = np.where(real, np.random.default_rng(1).normal(size=query.shape), 0)
    gradients = jax.grad(
        lambda *x: jnp.sum(causal_attention(*x, mask, **options) * cotangent), argnums=(0, 1, 2)
    )(*arrays)
    rng = np.random.default_rng(2)
    for which, gradient in enumerate(gradients):
        direction = rng.normal(size=gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = [query, key, value]
            moved[which] = moved[which] + sign * 1e-6 * direction
            ends.append(np.sum(oracle(*moved, readable, **options) * cotangent))
        slope = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(np.sum(np.asarray(gradient, np.float64) * direction), slope, rtol=2e-4)


def test_queries_that_see_nothing_pass_no_gradient_and_stay_finite():
    query, key, value, token_mask, _ = inputs(9)
    mask = causal_mask(jnp.asarray(token_mask))
    arrays = [jnp.asarray(x, jnp.float32) for x in (query, key, value)]
    out, pullback = jax.vjp(lambda *x: causal_attention(*x, mask), *arrays)
    assert np.isfinite(out).all()
    blind = np.zeros(out.shape, np.float32)
    blind[1, :3] = 1.0
    for gradient in pullback(jnp.asarray(blind)):
        np.testing.assert_array_equal(gradient, 0.0)
