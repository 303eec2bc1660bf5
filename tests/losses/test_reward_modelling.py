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


def test_how_likely_an_order_is_by_hand_and_against_the_cross_entropy():
    """Three responses, of which the first two were compared 3 to 1: a quarter of their pair is the other way round."""
    rewards, ranks, mask = (
        np.array([[2.0, 1.0, 0.5]], np.float32),
        np.array([[0, 1, 2]]),
        np.ones((1, 3), bool),
    )
    likely = np.ones((1, 3, 3), np.float32)
    likely[0, 0, 1], likely[0, 1, 0] = 0.75, 0.25
    first = 0.75 * np.log1p(np.exp(-1.0)) + 0.25 * np.log1p(np.exp(1.0))
    expected = (first + np.log1p(np.exp(-1.5)) + np.log1p(np.exp(-0.5))) / 3
    found = losses.pairwise_ranking_loss(rewards, ranks, mask, likely)
    assert float(found[0]) == pytest.approx(expected, rel=1e-6)
    certain = losses.pairwise_ranking_loss(rewards, ranks, mask, np.ones((1, 3, 3), np.float32))
    np.testing.assert_array_equal(certain, losses.pairwise_ranking_loss(rewards, ranks, mask))
    # The gradient of a cross-entropy: what the rewards say less what the label says, over pairs.
    gradient = jax.grad(lambda r: losses.pairwise_ranking_loss(r, ranks, mask, likely).sum())(rewards)
    says = 1 / (1 + np.exp(-np.array([1.0, 1.5, 0.5]))) - np.array([0.75, 1.0, 1.0])
    np.testing.assert_allclose(
        gradient[0], [says[0] + says[1], says[2] - says[0], -says[1] - says[2]] / np.float32(3), rtol=1e-5
    )
    to_labels = jax.grad(lambda p: losses.pairwise_ranking_loss(rewards, ranks, mask, p).sum())(likely)
    np.testing.assert_array_equal(to_labels, np.zeros_like(likely))
    with pytest.raises(
        ValueError, match=r"probability must have the shape of the pairs of rewards, \[1, 3, 3\]"
    ):
        losses.pairwise_ranking_loss(rewards, ranks, mask, np.ones((1, 3), np.float32))


def test_labels_of_no_pair_are_not_read():
    """Not those under the mask, of a tie, or the other way round."""
    rng = np.random.default_rng(2)
    rewards, ranks = rng.standard_normal((4, 3)).astype(np.float32), np.array([[0, 1, 1]] * 4)
    mask = np.array([[True, True, False]] * 4)
    likely = np.full((4, 3, 3), np.nan, np.float32)
    likely[:, 0, 1] = 0.7
    value, gradient = jax.value_and_grad(
        lambda r: losses.pairwise_ranking_loss(r, ranks, mask, likely).sum()
    )(rewards)
    clean = np.where(np.isnan(likely), 0.2, likely).astype(np.float32)
    same, slope = jax.value_and_grad(lambda r: losses.pairwise_ranking_loss(r, ranks, mask, clean).sum())(
        rewards
    )
    assert value == same and np.isfinite(value)
    np.testing.assert_array_equal(gradient, slope)


@pytest.fixture(scope="module")
def scored():
    """Rewards that like length, of 12 prompts with 2 to 4 responses each."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(3, 40, (12, 4)).astype(np.float32)
    rewards = (0.05 * lengths + rng.standard_normal((12, 4)) + rng.standard_normal((12, 1))).astype(
        np.float32
    )
    return rewards, lengths, np.arange(4) < rng.integers(2, 5, (12, 1))


def squared_correlation(rewards, lengths, mask):
    """Of what is left of both when each prompt's mean is taken off, by NumPy's own correlation."""
    left = [
        np.concatenate(
            [row[own] - row[own].mean() for row, own in zip(np.float64(values), mask, strict=True)]
        )
        for values in (rewards, lengths)
    ]
    return np.corrcoef(*left)[0, 1] ** 2


def test_the_length_penalty_is_the_squared_correlation_and_has_its_gradient(scored):
    """Also where the batch is taken in parts, each with the moments of the whole."""
    rewards, lengths, mask = scored
    exact = squared_correlation(*scored)
    assert 0.1 < exact < 0.9

    def moments(rewards):
        return losses.length_moments(rewards, lengths, mask).mean(axis=0)

    known = np.tile(moments(rewards), (12, 1)).T

    def in_parts(rewards, parts):
        rows = np.split(np.arange(12), parts)
        return (
            sum(losses.length_penalty_loss(rewards[i], lengths[i], mask[i], *known[:, i]).sum() for i in rows)
            / 12
        )

    def directly(rewards):
        variance, shared, spread = moments(rewards)
        return shared**2 / (variance * spread)

    expected = jax.grad(directly)(rewards)
    for parts in (1, 3, 12):
        value, gradient = jax.value_and_grad(in_parts)(rewards, parts)
        assert float(value) == pytest.approx(exact, rel=1e-5)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_a_reward_of_no_prompt_s_own_lengths_is_not_penalised(scored):
    """What differs between prompts only has no correlation within them, and neither have lengths that never differ."""
    rewards, lengths, mask = scored
    flat = np.repeat(lengths.mean(axis=1, keepdims=True), 4, axis=1)
    for given, tokens in ((flat, lengths), (rewards, flat)):
        found = np.tile(losses.length_moments(given, tokens, mask).mean(axis=0), (12, 1)).T
        value, gradient = jax.value_and_grad(
            lambda r, tokens=tokens, found=found: losses.length_penalty_loss(r, tokens, mask, *found).mean()
        )(given)
        assert float(value) == pytest.approx(0.0, abs=1e-6) and np.isfinite(gradient).all()


def test_following_the_penalty_takes_length_out_of_a_reward(scored):
    """Gradient descent on the penalty alone, from correlation to none."""
    rewards, lengths, mask = scored

    @jax.jit
    def step(rewards):
        found = jnp.tile(losses.length_moments(rewards, lengths, mask).mean(axis=0), (12, 1)).T
        return rewards - 20.0 * jax.grad(
            lambda r: losses.length_penalty_loss(r, lengths, mask, *found).mean()
        )(rewards)

    before = rewards
    for _ in range(200):
        rewards = step(rewards)
    assert squared_correlation(rewards, lengths, mask) < 1e-3 < squared_correlation(before, lengths, mask)
