"""Weighted sums by hand, and a Lagrangian that finds the constrained optimum of a case with a known answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rewards import objectives


def test_a_weighted_sum_by_hand():
    scores = jnp.array([[1.0, 2.0], [10.0, -20.0], [jnp.nan, jnp.inf]])
    found = objectives.weighted_sum(scores, jnp.array([1.0, 0.5, 0.0]))
    np.testing.assert_allclose(found, [6.0, -8.0])
    with pytest.raises(ValueError, match="weights must have one entry"):
        objectives.weighted_sum(scores, jnp.ones(2))


def test_the_lagrangian_reward_by_hand():
    helpful, harmless = jnp.array([1.0, 2.0]), jnp.array([0.5, -3.0])
    found = objectives.lagrangian_reward(helpful, harmless, 3.0, at_least=-1.0)
    # (1 + 3 * 1.5) / 4 and (2 + 3 * -2) / 4
    np.testing.assert_allclose(found, [1.375, -1.0])
    np.testing.assert_allclose(objectives.lagrangian_reward(helpful, harmless, 0.0, at_least=9.0), helpful)
    far = objectives.lagrangian_reward(helpful, harmless, 1e6, at_least=-1.0)
    np.testing.assert_allclose(far, [1.5, -2.0], atol=1e-5)
    gradient = jax.grad(lambda m: objectives.lagrangian_reward(helpful, harmless, m, at_least=0.0).sum())(1.0)
    assert gradient == 0.0
    with pytest.raises(ValueError, match="multiplier must be 0 or above"):
        objectives.lagrangian_reward(helpful, harmless, -1.0, at_least=0.0)


def test_the_multiplier_moves_with_the_shortfall_and_stays_within_bounds():
    def step(multiplier, values, **changes):
        given = {"at_least": 1.0, "rate": 0.5, "limit": 10.0} | changes
        return float(objectives.dual_ascent(multiplier, jnp.array(values), **given))

    assert step(2.0, [0.0, 1.0]) == pytest.approx(2.25)
    assert step(2.0, [2.0, 3.0]) == pytest.approx(1.25)
    assert step(0.1, [9.0, 9.0]) == 0.0
    assert step(9.9, [-9.0, -9.0]) == 10.0
    for name in ("rate", "limit"):
        with pytest.raises(ValueError, match=f"{name} must be above 0"):
            step(1.0, [0.0], **{name: 0.0})


@pytest.mark.parametrize(("at_least", "binds"), [(0.6, True), (-5.0, False)])
def test_dual_ascent_finds_the_constrained_optimum(at_least, binds):
    """Maximise E[h] - beta KL subject to E[s] >= c over 50 responses, whose optimum is known up to one multiplier."""
    rng = np.random.default_rng(8)
    helpful, harmless = rng.normal(size=50), rng.normal(size=50)
    helpful -= 0.8 * harmless
    log_reference, beta = np.log(rng.dirichlet(np.ones(50))), 0.5

    def optimum(multiplier):
        weights = log_reference + (helpful + multiplier * harmless) / beta
        weights = np.exp(weights - weights.max())
        return weights / weights.sum()

    low, high = 0.0, 50.0
    for _ in range(100):  # E[s] rises with the multiplier
        middle = (low + high) / 2
        low, high = (middle, high) if optimum(middle) @ harmless < at_least else (low, middle)

    @jax.jit
    def iterate(multiplier, _):
        rewards = objectives.lagrangian_reward(helpful, harmless, multiplier, at_least=at_least)
        # The policy's optimum for this reward; the division by 1 + lambda goes into the leash.
        policy = jax.nn.softmax(log_reference + rewards * (1.0 + multiplier) / beta)
        # 50 responses in the proportions of the policy.
        seen = harmless * policy * 50
        return objectives.dual_ascent(multiplier, seen, at_least=at_least, rate=0.5, limit=50.0), None

    helpful, harmless, log_reference = (
        jnp.asarray(x, jnp.float32) for x in (helpful, harmless, log_reference)
    )
    found, _ = jax.lax.scan(iterate, jnp.float32(1.0), None, length=400)
    if binds:
        assert low > 0.1
        np.testing.assert_allclose(found, low, rtol=1e-3)
    else:
        assert found == 0.0 and low < 1e-6
