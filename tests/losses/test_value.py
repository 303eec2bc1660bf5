"""Value losses: by hand, on both sides of the clip."""

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax import losses


@pytest.mark.parametrize(
    "value, old, target, loss, slope",
    [
        (0.1, 0.0, 1.0, 0.405, -0.9),  # within the clip: the plain loss
        (0.5, 0.0, 1.0, 0.32, 0.0),  # moved past it towards the target: (0.2 - 1)^2 / 2, no more reward
        (-0.5, 0.0, 1.0, 1.125, -1.5),  # moved past it the wrong way: the larger, plain loss
    ],
)
def test_clipped_by_hand(value, old, target, loss, slope):
    def of(v):
        return losses.clipped_value_loss(v, jnp.full((1, 1), old), jnp.full((1, 1), target), clip=0.2).sum()

    ours, gradient = jax.value_and_grad(of)(jnp.full((1, 1), value))
    assert float(ours) == pytest.approx(loss, rel=1e-5) and float(gradient[0, 0]) == pytest.approx(
        slope, abs=1e-6
    )


def test_plain_by_hand():
    ours, gradient = jax.value_and_grad(lambda v: losses.value_loss(v, jnp.full((1, 1), 3.0)).sum())(
        jnp.ones((1, 1))
    )
    assert float(ours) == 2.0 and float(gradient[0, 0]) == -2.0


def test_a_wide_clip_is_none():
    v, old, target = jnp.array([[0.3, -4.0]]), jnp.array([[1.0, 2.0]]), jnp.array([[-2.0, 0.5]])
    clipped = losses.clipped_value_loss(v, old, target, clip=1e6)
    assert clipped[0].tolist() == pytest.approx(losses.value_loss(v, target)[0].tolist(), rel=1e-5)
