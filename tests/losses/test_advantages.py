"""Advantages: by hand, in their limits, and over groups that say nothing."""

import numpy as np
import pytest

from rlhf_jax import losses


def gae(rewards, values, mask=None, **options):
    rewards, values = np.array([rewards], np.float32), np.array([values], np.float32)
    mask = np.ones(rewards.shape, bool) if mask is None else np.array([mask], bool)
    advantages, returns = losses.generalized_advantage_estimation(rewards, values, mask, **options)
    return np.asarray(advantages)[0], np.asarray(returns)[0]


def test_by_hand():
    """delta = (0 + 2 - 1, 5 - 2) = (1, 3); A = (1 + .5 * 3, 3)."""
    advantages, returns = gae([0.0, 5.0], [1.0, 2.0], gamma=1.0, lam=0.5)
    np.testing.assert_allclose(advantages, [2.5, 3.0])
    np.testing.assert_allclose(returns, [3.5, 5.0])


def test_limits():
    """lambda 1: discounted return less value. lambda 0: one temporal difference."""
    rewards, values = [1.0, 2.0, 4.0], [0.5, -1.0, 3.0]
    advantages, returns = gae(rewards, values, gamma=0.5, lam=1.0)
    np.testing.assert_allclose(returns, [1 + 1 + 1, 2 + 2, 4])
    np.testing.assert_allclose(advantages, np.array([3.0, 4.0, 4.0]) - values)
    advantages, _ = gae(rewards, values, gamma=0.5, lam=0.0)
    np.testing.assert_allclose(advantages, [1 - 0.5 - 0.5, 2 + 1.5 + 1.0, 1.0])


def test_holes_are_skipped():
    """A masked token in the middle is as if it were not there; its reward and value are never read."""
    whole = gae([1.0, 99.0, 2.0], [0.3, -99.0, 0.7], [True, False, True], gamma=0.9, lam=0.8)
    without = gae([1.0, 2.0], [0.3, 0.7], gamma=0.9, lam=0.8)
    for ours, expected in zip(whole, without, strict=True):
        np.testing.assert_allclose(ours, [expected[0], 0.0, expected[1]], rtol=1e-6)


def test_leave_one_out_by_hand():
    np.testing.assert_allclose(
        losses.leave_one_out_advantages(np.array([[1.0, 2.0, 6.0]], np.float32)), [[-3.0, -1.5, 4.5]]
    )


@pytest.mark.parametrize("value", [0.1, -7.3, 1e4])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_groups_that_say_nothing_give_exactly_zero(value, size):
    """0.1 seven times has a rounded mean that is not 0.1: zero is said, not computed."""
    rewards = np.full((2, size), value, np.float32)
    for advantages in (
        losses.group_relative_advantages(rewards),
        losses.group_relative_advantages(rewards, scale=False),
        losses.leave_one_out_advantages(rewards),
    ):
        np.testing.assert_array_equal(advantages, np.zeros((2, size)))


def test_dr_grpo_is_leave_one_out_times_one_less():
    """The group mean holds the response itself: (G - 1) / G of the leave-one-out advantage."""
    rewards = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    dr = losses.group_relative_advantages(rewards, scale=False)
    np.testing.assert_allclose(
        dr, np.asarray(losses.leave_one_out_advantages(rewards)) * 4 / 5, rtol=1e-5, atol=1e-6
    )


def test_epsilon_matters_for_close_rewards():
    """Rewards 1e-4 apart: TRL's epsilon of 1e-4 keeps them from becoming a full unit of advantage."""
    rewards = np.array([[0.0, 1e-4]], np.float32)
    spread = 1e-4 / np.sqrt(2)
    ours = losses.group_relative_advantages(rewards)
    np.testing.assert_allclose(ours, [[-5e-5 / (spread + 1e-4), 5e-5 / (spread + 1e-4)]], rtol=1e-5)
