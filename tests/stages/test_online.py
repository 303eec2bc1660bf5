"""What one iteration of an online stage hands to the next."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses
from rlhf_jax.masking import WeightedSum
from rlhf_jax.stages import online


@pytest.mark.parametrize(("kl", "expected"), [(9.0, 0.1 * 1.02), (np.nan, 0.1), (np.inf, 0.1 * 1.02)])
def test_a_kl_that_is_no_number_leaves_beta_as_it_is(kl, expected, monkeypatch):
    """An infinite one is clipped as any large one is."""
    mask = jnp.ones((2, 3), bool)
    rollout = types.SimpleNamespace(response_mask=mask, terminated=mask[:, 0], token_mask=mask)
    scored = types.SimpleNamespace(rollout=rollout, scores=jnp.zeros(2))
    monkeypatch.setattr(online, "update", lambda train, *_, **__: (train, {}))
    method = online.Method(
        prepare=None,
        objective=None,
        next_beta=functools.partial(losses.adaptive_beta, target=6.0, horizon=20.0, batch_size=2),
    )
    iterate = online.make_iteration(
        method,
        collect=lambda *_: (scored, np.arange(2), {}),
        prepare=lambda *_: (None, {"kl": WeightedSum(jnp.float32(2 * kl), jnp.float32(2))}),
        train_step=None,
        reference=None,
        num_epochs=1,
        num_minibatches=1,
    )
    train = types.SimpleNamespace(key=jax.random.key(0), params={}, step=jnp.int32(0))
    state = online.OnlineState(train=train, beta=jnp.float32(0.1), iteration=jnp.int32(0))
    state, _ = iterate(state, {})
    assert float(state.beta) == pytest.approx(expected, rel=1e-6)
