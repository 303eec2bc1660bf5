"""Logits of steps: those of a reward model on the text up to the step, blind to what follows, and trainable."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.losses import process_reward_loss
from rlhf_jax.models import decoder, heads
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.rewards import process, process_model, reward_model
from rlhf_jax.types import DemonstrationBatch

CONFIG = ModelConfig(
    vocab_size=11,
    width=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_width=16,
    max_length=16,
)
B, P, R, END = 4, 3, 6, 7


@pytest.fixture(scope="module")
def params():
    return {
        "decoder": decoder.init_params(CONFIG, jax.random.key(0))["decoder"],
        "head": heads.init_scalar_head(CONFIG, jax.random.key(1)),
    }


def batch_of(tokens, lengths):
    """Rows with a full prompt and responses of the given lengths."""
    response = np.arange(R)[None] < np.asarray(lengths)[:, None]
    mask = np.concatenate([np.ones((len(lengths), P), bool), response], axis=1)
    return DemonstrationBatch(
        tokens=jnp.asarray(tokens), token_mask=jnp.asarray(mask), response_mask=jnp.asarray(response)
    )


def test_a_step_is_judged_as_the_text_that_ends_with_it_and_by_nothing_after(params):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 11, (B, P + R))
    ends = np.array([[0, 2, 5], [1, 3, 3], [4, 0, 2], [5, 5, 1]], np.int32)
    logits = jax.jit(lambda p, b, e: process_model.step_logits(CONFIG, p, b, e))
    found = np.asarray(logits(params, batch_of(tokens, [R] * B), ends))
    score = jax.jit(lambda p, b: reward_model.score(CONFIG, p, b))
    for step in range(3):
        cut = score(params, batch_of(tokens, ends[:, step] + 1))
        np.testing.assert_allclose(found[:, step], cut, atol=1e-5)
    changed = tokens.copy()
    changed[:, P + 3 :] = (changed[:, P + 3 :] + 1) % 11
    again = np.asarray(logits(params, batch_of(changed, [R] * B), ends))
    np.testing.assert_allclose(again[ends < 3], found[ends < 3], atol=1e-5)
    assert np.abs(again - found)[ends >= 3].min() > 1e-4


def test_it_learns_which_steps_are_right(params):
    """A step (token before the mark) is right where that token is even: 128 rows are fitted and 128 new ones judged."""
    rng = np.random.default_rng(1)

    def rows(count):
        tokens = rng.integers(0, 6, (count, P + R))
        tokens[:, P + 1 :: 2] = END
        ends, mask = process.find_step_ends(jnp.asarray(tokens[:, P:] == END))
        return batch_of(tokens, [R] * count), ends, mask, (tokens[:, P::2] % 2 == 0)

    batch, ends, mask, labels = rows(128)
    labels = np.pad(labels, ((0, 0), (0, mask.shape[1] - labels.shape[1])))
    optimiser = optax.adam(1e-2)

    def loss(params):
        return (
            process_reward_loss(process_model.step_logits(CONFIG, params, batch, ends), labels, mask).sum()
            / mask.sum()
        )

    @jax.jit
    def fit(params):
        def step(carry, _):
            value, gradient = jax.value_and_grad(loss)(carry[0])
            updates, state = optimiser.update(gradient, carry[1])
            return (optax.apply_updates(carry[0], updates), state), value

        return jax.lax.scan(step, (params, optimiser.init(params)), None, length=150)

    (fitted, _), losses = fit(params)
    assert losses[0] > 0.5 and losses[-1] < 0.1
    batch, ends, mask, labels = rows(128)
    logits = np.asarray(process_model.step_logits(CONFIG, fitted, batch, ends))[:, : labels.shape[1]]
    assert np.mean((logits > 0) == labels) > 0.95


def test_wrong_ends_are_named(params):
    batch = batch_of(np.zeros((B, P + R), int), [R] * B)
    with pytest.raises(TypeError, match="step_ends must be integers"):
        process_model.step_logits(CONFIG, params, batch, np.zeros((B, 2)))
    with pytest.raises(ValueError, match="step_ends must have one entry a row of tokens"):
        process_model.step_logits(CONFIG, params, batch, np.zeros((B + 1, 2), int))
