"""Reward model losses: worked by hand, ties and margins, and what no comparison can tell."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses


def one(x):
    return np.array([x], np.float32)


BY_HAND = {
    "bradley_terry": (lambda: losses.bradley_terry_loss(one(2.0), one(1.0)), np.log(1 + np.exp(-1))),
    "bradley_terry, margin": (lambda: losses.bradley_terry_loss(one(2.0), one(1.0), margin=1.0), np.log(2)),
    "bradley_terry, centred": (
        lambda: losses.bradley_terry_loss(one(1.0), one(1.0), centering=0.01),
        np.log(2) + 0.04,
    ),
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


def test_ranks_are_numbers():
    rewards, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
    for loss in (losses.pairwise_ranking_loss, losses.plackett_luce_loss):
        with pytest.raises(TypeError, match="ranks must be numbers, smaller is better, got bool"):
            loss(rewards, mask, mask)
        with pytest.raises(ValueError, match=r"ranks must have the shape of rewards, \[1, 2\], got \[2\]"):
            loss(rewards, jnp.arange(2), mask)
