"""Direct preference losses: worked by hand, and the limits that tie one to another."""

import jax
import numpy as np
import pytest

from rlhf_jax import losses

ZERO = np.zeros(1, np.float32)


def one(x):
    return np.array([x], np.float32)


BY_HAND = {
    "dpo at the reference": (
        lambda: losses.dpo_loss(one(-3.0), one(-5.0), one(-3.0), one(-5.0), beta=0.1),
        np.log(2),
    ),
    "dpo": (
        lambda: losses.dpo_loss(one(-3.0), one(-5.0), one(-4.0), one(-4.0), beta=0.5),
        np.log(1 + np.exp(-1)),
    ),
    "ipo": (lambda: losses.ipo_loss(one(2.0), one(-1.0), ZERO, ZERO, beta=0.1), 4.0),
    "hinge": (lambda: losses.hinge_loss(one(2.0), one(-1.0), ZERO, ZERO, beta=0.1), 0.7),
    "hinge, satisfied": (lambda: losses.hinge_loss(one(9.0), one(-2.0), ZERO, ZERO, beta=0.1), 0.0),
    "simpo": (lambda: losses.simpo_loss(one(-1.0), one(-2.0), beta=2.0, margin=2.0), np.log(2)),
    "orpo": (lambda: losses.orpo_loss(np.log(one(0.8)), np.log(one(0.5)), weight=0.1), 0.1 * np.log(1.25)),
    "kto, desirable": (
        lambda: losses.kto_loss(one(2.0), ZERO, np.array([True]), one(-5.0), beta=1.0),
        1 - 1 / (1 + np.exp(-2)),
    ),
    "kto, undesirable": (
        lambda: losses.kto_loss(
            one(2.0), ZERO, np.array([False]), one(2.0), beta=1.0, undesirable_weight=3.0
        ),
        1.5,
    ),
    "implicit_rewards": (lambda: losses.implicit_rewards(one(-10.0), one(-12.0), beta=0.5), 1.0),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    value, expected = BY_HAND[name]
    assert float(value()[0]) == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_robust_dpo_without_noise_is_dpo():
    rng = np.random.default_rng(1)
    four = rng.standard_normal((4, 6)).astype(np.float32)
    np.testing.assert_allclose(
        losses.robust_dpo_loss(*four, beta=0.3, label_smoothing=0.0),
        losses.dpo_loss(*four, beta=0.3),
        rtol=1e-6,
    )


def test_kto_baseline_is_not_below_zero():
    policy = np.array([0.5, 0.5], np.float32)
    good = np.array([True, False])
    below = losses.kto_loss(policy, np.zeros(2, np.float32), good, np.float32(-3.0), beta=1.0)
    zero = losses.kto_loss(policy, np.zeros(2, np.float32), good, np.float32(0.0), beta=1.0)
    np.testing.assert_array_equal(below, zero)


def test_a_certain_response_has_finite_odds():
    """log p = 0 on the chosen side: odds of a million, where log(p / (1 - p)) has no value."""
    loss, gradient = jax.value_and_grad(lambda c: losses.orpo_loss(c, np.log(one(0.5)), weight=1.0).sum())(
        ZERO
    )
    assert float(loss) == pytest.approx(1e-6, rel=1e-3)
    assert float(gradient[0]) == 0.0
    assert float(losses.orpo_loss(np.log(one(0.5)), ZERO, weight=1.0)[0]) == pytest.approx(
        np.log(1e6), rel=1e-4
    )


def test_a_margin_a_row():
    """SimPO's margin may differ from pair to pair; it is part of the objective, so it gets no gradient."""
    chosen, rejected = np.array([-1.0, -1.0], np.float32), np.array([-2.0, -2.0], np.float32)
    margins = np.array([2.0, 0.0], np.float32)
    ours = losses.simpo_loss(chosen, rejected, beta=2.0, margin=margins)
    np.testing.assert_allclose(ours, [np.log(2), np.log1p(np.exp(-2.0))], rtol=1e-6)
    gradient = jax.grad(lambda m: losses.simpo_loss(chosen, rejected, beta=2.0, margin=m).sum())(margins)
    np.testing.assert_array_equal(gradient, 0.0)
    with pytest.raises(
        ValueError, match=r"margin must have the shape of policy_chosen_mean, \[2\], got \[3\]"
    ):
        losses.simpo_loss(chosen, rejected, beta=2.0, margin=np.ones(3, np.float32))
