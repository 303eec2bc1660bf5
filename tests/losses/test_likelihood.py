"""Log-probabilities and entropies: by hand, at extremes, and the chunked head against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses, masking


def test_by_hand():
    """softmax(log 1, log 3) at temperature 1 and, sharpened to 1 : 9, at one half."""
    logits, target = np.log(np.array([[[1.0, 3.0]]], np.float32)), np.array([[1]])
    for temperature, p in [(1.0, 0.75), (0.5, 0.9)]:
        ours = losses.token_log_probs(logits, target, temperature=temperature)
        assert float(ours[0, 0]) == pytest.approx(np.log(p), rel=1e-6)
        entropy = -p * np.log(p) - (1 - p) * np.log(1 - p)
        assert float(losses.token_entropy(logits, temperature=temperature)[0, 0]) == pytest.approx(
            entropy, rel=1e-6
        )


def test_supervised_loss_is_a_composition():
    """Cross-entropy of the unmasked targets and its textbook gradient, (p - onehot) / tokens."""
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((2, 3, 4)).astype(np.float32), rng.integers(0, 4, (2, 3))
    mask = np.array([[True, True, False], [True, False, False]])
    loss, gradient = jax.value_and_grad(
        lambda z: masking.token_mean(-losses.token_log_probs(z, targets), mask).mean()
    )(logits)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    picked = np.take_along_axis(p, targets[..., None], -1)[..., 0]
    assert float(loss) == pytest.approx(-np.log(picked[mask]).mean(), rel=1e-6)
    expected = (p - np.eye(4)[targets]) * mask[..., None] / mask.sum()
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize(
    "row, target, log_prob, entropy",
    [
        ([1e4, -1e4, 0.0], 0, 0.0, 0.0),
        ([1e4, -1e4, 0.0], 1, -2e4, 0.0),
        ([1e4, 1e4, -1e4], 1, -np.log(2), np.log(2)),
        ([-1e4, -1e4, -1e4], 2, -np.log(3), np.log(3)),
        ([0.0, 0.0, -np.inf], 0, -np.log(2), np.log(2)),
    ],
)
def test_extreme_logits(row, target, log_prob, entropy):
    """Exact to float32 at +-10,000 and with tokens that cannot be sampled; the chunked head too."""
    logits, targets = np.array([[row]], np.float32), np.array([[target]])
    assert float(losses.token_log_probs(logits, targets)[0, 0]) == pytest.approx(log_prob, rel=1e-6)
    assert float(losses.token_entropy(logits)[0, 0]) == pytest.approx(entropy, rel=1e-6, abs=1e-7)
    slope = jax.grad(lambda z: losses.token_log_probs(z, targets).sum() + losses.token_entropy(z).sum())(
        logits
    )
    p = np.exp(np.array(row, np.float64) - max(row))
    p /= p.sum()
    log_p = np.log(np.maximum(p, 1e-300))
    np.testing.assert_allclose(slope[0, 0], np.eye(3)[target] - p - p * (log_p + entropy), atol=1e-6)
    if np.isfinite(row).all():
        head = np.array(row, np.float32)[:, None]
        ours = losses.chunked_token_log_probs(np.ones((1, 1, 1), np.float32), head, targets, chunk_size=1)
        np.testing.assert_allclose(np.stack(ours)[:, 0, 0], [log_prob, entropy], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("poison", [[np.nan, 0.0], [np.inf, 0.0], [-np.inf, -np.inf]])
def test_an_unusable_position_says_so_and_pulls_nothing(poison):
    """NaN as value where it cannot be computed, zero as gradient, and the position beside it untouched."""
    logits = np.array([[poison, [0.0, 1.0]]], np.float32)
    targets = np.array([[0, 1]])
    for function in (lambda z: losses.token_log_probs(z, targets), losses.token_entropy):
        values = function(logits)
        assert np.isnan(values[0, 0])
        assert float(values[0, 1]) == float(function(logits[:, 1:].repeat(2, 1))[0, 1])
        gradient = jax.grad(lambda z, function=function: function(z).sum())(logits)
        np.testing.assert_array_equal(gradient[0, 0], 0.0)
        assert np.abs(gradient[0, 1]).max() > 0.1


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 4], ids=["plain", "1", "2", "4"])
def test_a_target_that_is_no_token_says_so_and_pulls_nothing(chunk_size):
    """V, -1 and -100 are not wrapped around to some other token: NaN, gradient 0, and the position beside untouched."""
    rng = np.random.default_rng(3)
    hidden, unembedding = rng.standard_normal((1, 4, 3)), rng.standard_normal((5, 3))
    hidden, unembedding = hidden.astype(np.float32), unembedding.astype(np.float32)
    targets = np.array([[2, 5, -1, -100]])

    def log_probs(h, targets):
        if chunk_size is None:
            return losses.token_log_probs(h @ unembedding.T, targets)
        return losses.chunked_token_log_probs(h, unembedding, targets, chunk_size=chunk_size)[0]

    values, pull = jax.vjp(lambda h: log_probs(h, targets), hidden)
    np.testing.assert_array_equal(np.isnan(values[0]), [False, True, True, True])
    (gradient,) = pull(jnp.ones((1, 4)))
    np.testing.assert_array_equal(gradient[0, 1:], 0.0)
    alone, pull_alone = jax.vjp(lambda h: log_probs(h, targets[:, :1]), hidden[:, :1])
    assert float(values[0, 0]) == pytest.approx(float(alone[0, 0]), rel=1e-6)
    # Beside the gradient's own size: a component near 0 is what is left of terms that cancel.
    (expected,) = pull_alone(jnp.ones((1, 1)))
    np.testing.assert_allclose(gradient[:, :1], expected, rtol=0, atol=3e-6 * np.abs(expected).max())


B, T, D, V = 3, 5, 8, 37


@pytest.fixture(scope="module")
def head():
    rng = np.random.default_rng(1)
    hidden, unembedding = rng.standard_normal((B, T, D)), rng.standard_normal((V, D))
    return hidden.astype(np.float32), unembedding.astype(np.float32), rng.integers(0, V, (B, T))


def weighted(head, pair):
    rng = np.random.default_rng(2)
    weights = rng.standard_normal((2, B, T)).astype(np.float32)
    return jnp.sum(weights[0] * pair[0]) + jnp.sum(weights[1] * pair[1])


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 7, 15, 1000])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_chunked_equals_plain(head, chunk_size, softcap):
    """Any chunk, dividing or not (37 is prime): values, and gradients in hidden, unembedding and temperature."""
    hidden, unembedding, targets = head

    def plain(h, u, temperature):
        logits = h @ u.T if softcap is None else softcap * jnp.tanh(h @ u.T / softcap)
        pair = (
            losses.token_log_probs(logits, targets, temperature=temperature),
            losses.token_entropy(logits, temperature=temperature),
        )
        return weighted(head, pair), pair

    def chunked(h, u, temperature):
        pair = losses.chunked_token_log_probs(
            h, u, targets, chunk_size=chunk_size, temperature=temperature, softcap=softcap
        )
        return weighted(head, pair), pair

    with jax.enable_x64(True):
        point = hidden.astype(np.float64), unembedding.astype(np.float64), 0.7
        (_, exact), exact_gradients = jax.value_and_grad(plain, (0, 1, 2), has_aux=True)(*point)
    (_, ours), gradients = jax.jit(jax.value_and_grad(chunked, (0, 1, 2), has_aux=True))(
        hidden, unembedding, 0.7
    )
    for value, expected in zip((*ours, *gradients[:2]), (*exact, *exact_gradients[:2]), strict=True):
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6 * scale)
    assert float(gradients[2]) == pytest.approx(
        float(exact_gradients[2]), rel=1e-5
    )  # a sum over all, with both signs


@pytest.mark.parametrize("which", [0, 1], ids=["log_probs alone", "entropy alone"])
def test_chunked_with_one_output_differentiated(head, which):
    hidden, unembedding, targets = head

    def plain(h, u):
        logits = h @ u.T
        return (losses.token_entropy(logits) if which else losses.token_log_probs(logits, targets)).sum()

    def chunked(h, u):
        return losses.chunked_token_log_probs(h, u, targets, chunk_size=4)[which].sum()

    ours, expected = (jax.jit(jax.grad(f, (0, 1)))(hidden, unembedding) for f in (chunked, plain))
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_chunked_ignores_poison_under_a_mask(head):
    hidden, unembedding, targets = head
    mask = np.ones((B, T), bool)
    mask[1, 2:] = False

    def loss(h, u):
        log_probs, entropy = losses.chunked_token_log_probs(h, u, targets, chunk_size=4)
        return masking.token_mean(-log_probs - 0.1 * entropy, mask).mean()

    clean = jax.value_and_grad(loss, (0, 1))(hidden, unembedding)
    poisoned = jax.value_and_grad(loss, (0, 1))(np.where(mask[..., None], hidden, np.nan), unembedding)
    for ours, expected in zip(jax.tree.leaves(poisoned), jax.tree.leaves(clean), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-7)


def test_chunked_never_holds_the_logits():
    """At the bench shape, compiled: no array of [B, T, V], and less than a half (a tenth) of the temporary memory."""
    b, t, d, v = 8, 255, 288, 32_000
    shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((b, t, d), (v, d)))
    hidden, unembedding = shapes
    targets = jnp.zeros((b, t), jnp.int32)
    held = {}
    for name, function in {
        "plain": lambda h, u: losses.token_log_probs(h @ u.T, targets).sum(),
        "chunked": lambda h, u: losses.chunked_token_log_probs(h, u, targets, chunk_size=255)[0].sum(),
    }.items():
        compiled = jax.jit(jax.value_and_grad(function, (0, 1))).lower(hidden, unembedding).compile()
        held[name] = compiled.memory_analysis().temp_size_in_bytes
        assert (f"{b},{t},{v}" in compiled.as_text() or f"{b * t},{v}" in compiled.as_text()) == (
            name == "plain"
        )
    assert held["chunked"] * 10 < held["plain"]


def test_refusals(head):
    hidden, unembedding, targets = head
    with pytest.raises(ValueError, match=r"unembedding must have shape \[V, 8\], hidden's D, got \[37, 7\]"):
        losses.chunked_token_log_probs(hidden, unembedding[:, :7], targets, chunk_size=4)
    with pytest.raises(TypeError, match="targets must be integers"):
        losses.token_log_probs(np.zeros((1, 2, 3), np.float32), np.zeros((1, 2), np.float32))
    with pytest.raises(ValueError, match=r"targets must have shape \[1, 2\], got \[2, 1\]"):
        losses.token_log_probs(np.zeros((1, 2, 3), np.float32), np.zeros((2, 1), np.int32))
    with pytest.raises(ValueError, match="softcap must be above 0, got 0.0"):
        losses.chunked_token_log_probs(hidden, unembedding, targets, chunk_size=4, softcap=0.0)
    with pytest.raises(TypeError, match="temperature must be a number"):
        losses.token_entropy(np.zeros((1, 2, 3), np.float32), temperature="hot")
