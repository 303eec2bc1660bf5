"""KL estimators, the leash, and its controller: by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlhf_jax import losses


def test_estimators_by_hand():
    new, ref = np.array([-1.0, -2.0], np.float32), np.array([-1.5, -2.0], np.float32)
    np.testing.assert_allclose(losses.kl_k1(new, ref), [0.5, 0.0])
    np.testing.assert_allclose(losses.kl_k2(new, ref), [0.125, 0.0])
    np.testing.assert_allclose(losses.kl_k3(new, ref), [np.exp(-0.5) - 0.5, 0.0], rtol=1e-6)


def test_full_kl_by_hand():
    """(1/2, 1/2) and (1/4, 3/4), both ways; and a token that one side cannot sample."""
    half, quarter = (np.log(np.array([[p]], np.float32)) for p in ([0.5, 0.5], [0.25, 0.75]))
    reverse = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    forward = 0.25 * np.log(0.5) + 0.75 * np.log(1.5)
    assert float(losses.full_kl(half, quarter)[0, 0]) == pytest.approx(reverse, rel=1e-6)
    assert float(losses.full_forward_kl(half, quarter)[0, 0]) == pytest.approx(forward, rel=1e-6)
    only = np.array([[[0.0, -np.inf]]], np.float32)
    assert float(losses.full_kl(only, half)[0, 0]) == pytest.approx(np.log(2), rel=1e-6)
    np.testing.assert_allclose(jax.grad(lambda z: losses.full_kl(z, half).sum())(only), 0.0, atol=1e-7)


@pytest.mark.parametrize("gap", [25.0, 1e3, 2e4])
def test_k3_is_bounded_in_value_and_slope(gap):
    """A token that the reference finds e^gap times likelier: e^20, gradient 0. The other way: exact, slope 1."""
    far = jnp.array([-gap])
    value, slope = jax.value_and_grad(lambda new: losses.kl_k3(new, jnp.zeros(1)).sum())(far)
    assert float(value) == pytest.approx(np.expm1(20.0) - 20.0, rel=1e-6) and float(slope[0]) == 0.0
    value, slope = jax.value_and_grad(lambda new: losses.kl_k3(new, far).sum())(jnp.zeros(1))
    assert float(value) == pytest.approx(gap - 1.0, rel=1e-6) and float(slope[0]) == pytest.approx(1.0)


def test_reward_lands_on_the_last_response_token():
    """Not on the first pad, not on the last column; with a hole, on the last token there is; on nothing if none."""
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], bool)
    kl = np.full((4, 4), 0.5, np.float32)
    rewards = losses.kl_penalized_rewards(np.array([1.0, 2.0, 3.0, 4.0], np.float32), kl, mask, beta=0.2)
    expected = [[-0.1, 0.9, 0, 0], [-0.1, -0.1, -0.1, 1.9], [-0.1, 0, 2.9, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(rewards, expected, rtol=1e-6)


def test_fractional_scores_survive():
    """0.7 stays 0.7: no integer buffer anywhere; an integer score is refused."""
    zeros, mask = np.zeros((1, 2), np.float32), np.ones((1, 2), bool)
    assert float(
        losses.kl_penalized_rewards(np.array([0.7], np.float32), zeros, mask, beta=1.0)[0, 1]
    ) == np.float32(0.7)
    with pytest.raises(TypeError, match="scores must be floating, got int32"):
        losses.kl_penalized_rewards(np.array([1], np.int32), zeros, mask, beta=1.0)


def test_no_leash_is_a_kl_of_zeros():
    zeros, mask = np.zeros((1, 2), np.float32), np.ones((1, 2), bool)
    with pytest.raises(
        ValueError, match="beta must be above 0, got 0.0; without a leash, pass a kl of zeros"
    ):
        losses.kl_penalized_rewards(np.ones(1, np.float32), zeros, mask, beta=0.0)


def test_adaptive_beta():
    """Steady at its target, clipped at a fifth of batch_size / horizon, the same traced and eager, never negative."""
    options = {"target": 6.0, "horizon": 1000, "batch_size": 100}
    assert float(losses.adaptive_beta(0.1, 6.0, **options)) == pytest.approx(0.1)
    assert float(losses.adaptive_beta(0.1, 100.0, **options)) == pytest.approx(0.102)
    assert float(losses.adaptive_beta(0.1, -100.0, **options)) == pytest.approx(0.098)
    traced = jax.jit(lambda b, kl: losses.adaptive_beta(b, kl, **options))(0.1, 6.6)
    assert float(traced) == pytest.approx(0.1 * 1.01, rel=1e-6) and traced.dtype == jnp.float32
    many = jax.vmap(lambda kl: losses.adaptive_beta(0.1, kl, **options))(jnp.array([6.0, 100.0]))
    np.testing.assert_allclose(many, [0.1, 0.102], rtol=1e-6)


def test_adaptive_beta_under_every_transformation():
    """Eight leashes, eight observed KLs: one a device, one a row, one a step; and a constant of the objective."""
    betas = jnp.linspace(0.05, 0.4, 8)
    seen = jnp.linspace(0.0, 14.0, 8)
    expected = np.array(betas) * (1 + np.clip(np.array(seen) / 6.0 - 1, -0.2, 0.2) * 0.1)

    def update(beta, kl):
        return losses.adaptive_beta(beta, kl, target=6.0, horizon=1000, batch_size=100)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    by_device = jax.shard_map(
        lambda b, kl: update(b[0], kl[0])[None], mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    _, by_step = jax.lax.scan(lambda c, x: (c, jax.checkpoint(update)(*x)), None, (betas, seen))
    for ours in (
        jax.vmap(update)(betas, seen),
        jax.pmap(update)(betas, seen),
        by_device(betas, seen),
        by_step,
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)
    assert jax.grad(update, (0, 1))(0.1, 6.5) == (0.0, 0.0)


@pytest.mark.parametrize("name", ["beta", "target", "horizon", "batch_size"])
def test_adaptive_beta_refuses(name):
    options = {"beta": 0.1, "target": 6.0, "horizon": 1000, "batch_size": 100, name: 0}
    with pytest.raises(ValueError, match=f"^{name} must be above 0, got 0"):
        losses.adaptive_beta(options.pop("beta"), 6.0, **options)
