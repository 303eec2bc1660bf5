"""Preference losses: worked by hand, and the limits that tie one to another."""

import jax
import numpy as np
import pytest

from rlhf_jax import losses

ZERO = np.zeros(1, np.float32)


def one(x):
    return np.array([x], np.float32)


BY_HAND = {
    "bradley_terry": (lambda: losses.bradley_terry_loss(one(2.0), one(1.0)), np.log(1 + np.exp(-1))),
    "bradley_terry, margin": (lambda: losses.bradley_terry_loss(one(2.0), one(1.0), margin=1.0), np.log(2)),
    "bradley_terry, centred": (
        lambda: losses.bradley_terry_loss(one(1.0), one(1.0), centering=0.01),
        np.log(2) + 0.04,
    ),
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


def test_margin_a_row():
    losses_of_two = losses.bradley_terry_loss(
        np.ones(2, np.float32), np.zeros(2, np.float32), margin=one(1.0).repeat(2)
    )
    np.testing.assert_allclose(losses_of_two, np.log(2), rtol=1e-6)
    with pytest.raises(ValueError, match=r"margin must have the shape of chosen_rewards, \[2\], got \[3\]"):
        losses.bradley_terry_loss(
            np.ones(2, np.float32), np.zeros(2, np.float32), margin=np.ones(3, np.float32)
        )


def test_a_whole_number_is_a_margin():
    assert float(losses.bradley_terry_loss(one(2.0), one(1.0), margin=1)[0]) == pytest.approx(np.log(2))


def test_a_pair_is_a_ranking_of_two():
    rewards = np.array([[0.3, -1.2], [2.0, 2.5]], np.float32)
    ranks, mask = np.array([[0, 1], [0, 1]]), np.ones((2, 2), bool)
    expected = losses.bradley_terry_loss(rewards[:, 0], rewards[:, 1])
    np.testing.assert_allclose(losses.pairwise_ranking_loss(rewards, ranks, mask), expected, rtol=1e-6)
    np.testing.assert_allclose(losses.plackett_luce_loss(rewards, ranks, mask), expected, rtol=1e-6)


def test_a_prompt_with_many_pairs_weighs_as_much_as_one_with_one():
    """K = 4 and K = 2 with every gap equal to zero: log 2 each, not six times log 2."""
    rewards, ranks = np.zeros((2, 4), np.float32), np.tile(np.arange(4), (2, 1))
    mask = np.array([[True] * 4, [True, True, False, False]])
    np.testing.assert_allclose(losses.pairwise_ranking_loss(rewards, ranks, mask), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(
        losses.plackett_luce_loss(rewards, ranks, mask), np.log([24.0, 2.0]), rtol=1e-6
    )


def test_ties_make_no_pair():
    rewards, mask = np.array([[3.0, -1.0, 0.5]], np.float32), np.ones((1, 3), bool)
    assert float(losses.pairwise_ranking_loss(rewards, np.zeros((1, 3), np.int32), mask)[0]) == 0.0
    tied = float(losses.pairwise_ranking_loss(rewards, np.array([[0, 1, 1]]), mask)[0])
    assert tied == pytest.approx((np.log1p(np.exp(-4.0)) + np.log1p(np.exp(-2.5))) / 2, rel=1e-6)


def test_only_differences_matter():
    """Adding a constant to every reward changes no ranking loss, and its gradient sums to nothing."""
    rng = np.random.default_rng(0)
    rewards = rng.standard_normal((5, 4)).astype(np.float32)
    ranks, mask = np.tile(rng.permutation(4), (5, 1)), np.ones((5, 4), bool)
    for loss in (losses.pairwise_ranking_loss, losses.plackett_luce_loss):
        np.testing.assert_allclose(loss(rewards + 3, ranks, mask), loss(rewards, ranks, mask), rtol=1e-5)
        gradient = jax.grad(lambda r, loss=loss: loss(r, ranks, mask).sum())(rewards)
        np.testing.assert_allclose(gradient.sum(1), 0.0, atol=1e-6)


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
