import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from rlhf_jax.sampling.logits import behaviour_log_probs, draw, min_p_mask, top_k_mask, top_p_mask

LOGITS = np.random.default_rng(0).normal(size=(6, 40)) * 3.0 - 1.0


def softmax(row):
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def nucleus(row, p):
    """Tokens from the most probable down, until they hold at least p."""
    probabilities, kept, mass = softmax(row), np.zeros(row.shape, bool), 0.0
    for token in np.argsort(-row):
        if mass >= p:
            break
        kept[token] = True
        mass += probabilities[token]
    return kept


@pytest.mark.parametrize("k", [1, 7, 39, 40, 99])
def test_top_k_keeps_the_largest(k):
    expected = np.zeros(LOGITS.shape, bool)
    for row, order in enumerate(np.argsort(-LOGITS, axis=1)):
        expected[row, order[:k]] = True
    np.testing.assert_array_equal(top_k_mask(jnp.asarray(LOGITS), k), expected)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_holds_p(p):
    expected = np.stack([nucleus(row, p) for row in LOGITS])
    np.testing.assert_array_equal(top_p_mask(jnp.asarray(LOGITS), p), expected)


@pytest.mark.parametrize("p", [1e-6, 0.05, 0.5, 1.0])
def test_min_p_keeps_what_is_probable_enough_beside_the_most_probable(p):
    expected = np.stack([softmax(row) >= p * softmax(row).max() for row in LOGITS])
    np.testing.assert_array_equal(min_p_mask(jnp.asarray(LOGITS), p), expected)


def test_ties_at_the_threshold_stay_together_and_masked_tokens_stay_out():
    logits = jnp.array([[2.0, -jnp.inf, 1.0, 1.0, -0.0, 0.0, -3.0]])
    np.testing.assert_array_equal(top_k_mask(logits, 2)[0], [1, 0, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(top_k_mask(logits, 4)[0], [1, 0, 1, 1, 1, 1, 0])
    equal = jnp.zeros((1, 4))
    np.testing.assert_array_equal(top_p_mask(equal, 0.3)[0], [1, 1, 1, 1])


@pytest.mark.parametrize(
    ("temperature", "k", "p", "least"),
    [(1.0, 0, 1.0, 0.0), (0.5, 0, 1.0, 0.0), (1.7, 9, 1.0, 0.0), (0.8, 12, 0.6, 0.0), (1.2, 9, 0.9, 0.3)],
)
def test_behaviour_is_tempered_then_cut_to_k_then_to_p_then_to_min_p_and_renormalised(
    temperature, k, p, least
):
    actual = behaviour_log_probs(jnp.asarray(LOGITS), temperature=temperature, top_k=k, top_p=p, min_p=least)
    for row, log_probs in zip(LOGITS / temperature, actual, strict=True):
        row = row.copy()
        if k:
            row[np.argsort(-row)[k:]] = -np.inf
        if p < 1:
            row[~nucleus(row, p)] = -np.inf
        row[softmax(row) < least * softmax(row).max()] = -np.inf
        with np.errstate(divide="ignore"):
            expected = np.log(softmax(row))
        np.testing.assert_allclose(log_probs, expected, atol=2e-6)


def test_draws_follow_the_softmax_and_report_its_log_probs():
    rows, logits = 40_000, LOGITS[0].copy()
    logits[[3, 17]] = -np.inf
    keys = jax.random.split(jax.random.key(7), rows)
    tokens, log_probs = jax.jit(draw)(keys, jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (rows, 40)))
    probabilities = softmax(logits)
    counts = np.bincount(tokens, minlength=40)
    assert counts[3] == counts[17] == 0
    usual = probabilities * rows >= 5
    observed = np.append(counts[usual], counts[~usual].sum())
    expected = np.append(probabilities[usual], probabilities[~usual].sum()) * rows
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3
    np.testing.assert_allclose(log_probs, np.log(probabilities[np.asarray(tokens)]), atol=2e-6)


@pytest.mark.parametrize("vocabulary", [1, 2, 5, 37])
def test_a_certain_token_is_always_drawn(vocabulary):
    # Every token in turn, the last of the last block included, at extreme and at infinite distance.
    for low in (-1e4, -jnp.inf):
        logits = jnp.where(jnp.eye(vocabulary, dtype=bool), 1e4, low)
        for seed in range(3):
            tokens, log_probs = draw(jax.random.split(jax.random.key(seed), vocabulary), logits)
            np.testing.assert_array_equal(tokens, np.arange(vocabulary))
            np.testing.assert_array_equal(log_probs, 0.0)
