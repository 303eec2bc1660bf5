"""A language model as judge: probabilities by hand, no preference for a place, and the tokens that are read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import decoder
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.rewards import ai_feedback

MODEL = ModelConfig(
    vocab_size=11, width=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=16, max_length=16
)


def test_both_orders_are_averaged_by_hand():
    """0.8 as A, 0.6 as B, other tokens likely or not."""
    shown_first = jnp.log(jnp.array([[0.08, 0.02], [0.5, 0.5]]))
    shown_second = jnp.log(jnp.array([[0.4, 0.6], [1e-6, 0.9]]))
    found = ai_feedback.win_probability(shown_first, shown_second)
    np.testing.assert_allclose(found, [0.7, 0.5 * (0.5 + 0.9 / (0.9 + 1e-6))], rtol=1e-6)


def test_a_judge_that_prefers_a_place_prefers_no_response():
    always_first = jnp.log(jnp.array([[0.9, 0.1]]))
    assert float(ai_feedback.win_probability(always_first, always_first)[0]) == pytest.approx(0.5)


def test_swapping_the_responses_swaps_the_probability():
    rng = np.random.default_rng(0)
    one, other = (jnp.asarray(rng.normal(size=(20, 2)) * 5, jnp.float32) for _ in range(2))
    found = ai_feedback.win_probability(one, other) + ai_feedback.win_probability(other, one)
    np.testing.assert_allclose(found, 1.0, rtol=1e-6)


def test_win_rates_are_against_the_others_and_average_one_half():
    rng = np.random.default_rng(1)
    log_probs = rng.normal(size=(3, 4, 4, 2)).astype(np.float32)
    log_probs[:, range(4), range(4)] = 50.0  # never read
    expected = np.zeros((3, 4))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    for n in range(3):
        for i in range(4):
            wins = [
                (sigmoid(np.subtract(*log_probs[n, i, j])) + 1 - sigmoid(np.subtract(*log_probs[n, j, i])))
                / 2
                for j in range(4)
                if j != i
            ]
            expected[n, i] = np.mean(wins)
    found = ai_feedback.win_rates(log_probs)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(found.mean(axis=1), 0.5, rtol=1e-6)


def test_the_answer_is_read_behind_the_question_whatever_the_padding():
    params = decoder.init_params(MODEL, jax.random.key(0))
    question = np.array([3, 7, 1, 9, 4], np.int32)
    logits = decoder.logits(MODEL, params, question[None], np.ones((1, 5), bool))[0, -1]
    logits = np.asarray(logits, np.float64)
    expected = (logits - np.log(np.exp(logits).sum()))[np.array([6, 2])]
    for pad in (0, 4):
        tokens = np.concatenate([np.full(pad, 5, np.int32), question])[None]
        mask = (np.arange(5 + pad) >= pad)[None]
        found = ai_feedback.choice_log_probs(MODEL, params, jnp.asarray(tokens), jnp.asarray(mask), (6, 2))
        np.testing.assert_allclose(found[0], expected, atol=1e-5)
