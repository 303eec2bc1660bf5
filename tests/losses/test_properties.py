"""What holds for any input at all: masks of every shape, extreme logits, equal rewards, groups of one."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlhf_jax import losses

few = settings(max_examples=30, deadline=None)
SHAPE = (3, 4)
masks = hnp.arrays(bool, SHAPE)


def floats(shape, size=1e4):
    return hnp.arrays(np.float32, shape, elements=st.floats(-size, size, width=32))


@few
@given(floats((2, 3, 5)), hnp.arrays(np.int32, (2, 3), elements=st.integers(0, 4)))
def test_extreme_logits(logits, targets):
    """Log-probabilities are at most 0 and sum to 1, entropy is in [0, log V]; slopes sum to 0 over the vocabulary."""
    every = np.stack([losses.token_log_probs(logits, np.full((2, 3), v, np.int32)) for v in range(5)], -1)
    assert (every <= 0).all()
    np.testing.assert_allclose(np.exp(every).sum(-1), 1.0, rtol=1e-5)
    entropy = np.asarray(losses.token_entropy(logits))
    assert (entropy >= -1e-6).all() and (entropy <= np.log(5) + 1e-5).all()
    slope = jax.grad(lambda z: losses.token_log_probs(z, targets).sum() + losses.token_entropy(z).sum())(
        logits
    )
    np.testing.assert_allclose(slope.sum(-1), 0.0, atol=1e-3)


@few
@given(floats((2, 3, 5)), floats((2, 3, 5)))
def test_kl_is_not_negative_and_zero_only_at_home(logits, ref):
    assert (np.asarray(losses.full_kl(logits, ref)) >= -1e-3).all()
    np.testing.assert_array_equal(losses.full_kl(logits, logits), np.zeros((2, 3)))
    tokens, other = logits[..., 0], ref[..., 0]
    assert (np.asarray(losses.kl_k3(tokens, other)) >= 0).all()
    assert np.isfinite(jax.grad(lambda x: losses.kl_k3(x, other).sum())(tokens)).all()


@few
@given(
    floats(SHAPE, 100.0), floats(SHAPE, 100.0), masks, st.sampled_from([(1.0, 0.95), (0.5, 0.0), (0.0, 1.0)])
)
def test_advantages_over_any_mask(rewards, values, mask, discounts):
    """Bellman, wherever there are tokens: A_t = delta_t + gamma lambda A_next, returns = A + V; 0 elsewhere."""
    gamma, lam = discounts
    advantages, returns = losses.generalized_advantage_estimation(rewards, values, mask, gamma=gamma, lam=lam)
    advantages, returns = np.asarray(advantages, np.float64), np.asarray(returns, np.float64)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()
    for b in range(SHAPE[0]):
        tokens = np.flatnonzero(mask[b])
        following = dict(zip(tokens, tokens[1:], strict=False))
        for t in tokens:
            after = following.get(t)
            next_advantage, next_value = (
                (0.0, 0.0) if after is None else (advantages[b, after], values[b, after])
            )
            delta = rewards[b, t] + gamma * next_value - values[b, t]
            np.testing.assert_allclose(
                advantages[b, t], delta + gamma * lam * next_advantage, rtol=1e-4, atol=1e-3
            )
            np.testing.assert_allclose(returns[b, t], advantages[b, t] + values[b, t], rtol=1e-4, atol=1e-3)


@few
@given(floats(3, 100.0), floats(SHAPE, 100.0), masks)
def test_rewards_over_any_mask(scores, kl, mask):
    """A row pays its score once, on its last token, and beta times its KL; an empty row pays nothing."""
    rewards = np.asarray(losses.kl_penalized_rewards(scores, kl, mask, beta=0.5))
    assert (rewards[~mask] == 0).all()
    for b in range(3):
        expected = scores[b] - 0.5 * kl[b, mask[b]].sum() if mask[b].any() else 0.0
        np.testing.assert_allclose(rewards[b].sum(), expected, rtol=1e-4, atol=1e-3)
        if mask[b].any():
            last = np.flatnonzero(mask[b])[-1]
            np.testing.assert_allclose(rewards[b, last], scores[b] - 0.5 * kl[b, last], rtol=1e-4, atol=1e-3)


@few
@given(st.sampled_from([1, 2, 5]).flatmap(lambda size: floats((2, size), 100.0)))
def test_groups(rewards):
    """Advantages of a group sum to 0, keep the order of its rewards, and are exactly 0 where all are equal."""
    for advantages in (losses.group_relative_advantages(rewards), losses.leave_one_out_advantages(rewards)):
        advantages = np.asarray(advantages)
        np.testing.assert_allclose(advantages.sum(1), 0.0, atol=1e-3)
        for row, reward in zip(advantages, rewards, strict=True):
            if (reward == reward[0]).all():
                assert (row == 0).all()
            else:
                assert (np.diff(row[np.argsort(reward)]) >= -1e-5).all()


@few
@given(
    floats((2, 4), 100.0), hnp.arrays(np.int32, (2, 4), elements=st.integers(0, 3)), hnp.arrays(bool, (2, 4))
)
def test_rankings(rewards, ranks, mask):
    """Any ranks with ties, any mask: at least 0, the order of the candidates is no matter, masked ones have no say."""
    for loss in (losses.pairwise_ranking_loss, losses.plackett_luce_loss):
        ours = np.asarray(loss(rewards, ranks, mask))
        assert (ours >= -1e-4).all()
        flipped = loss(rewards[:, ::-1], ranks[:, ::-1], mask[:, ::-1])
        np.testing.assert_allclose(flipped, ours, rtol=1e-4, atol=1e-3)
        gradient = np.asarray(jax.grad(lambda r, loss=loss: loss(r, ranks, mask).sum())(rewards))
        assert (gradient[~mask] == 0).all()


@few
@given(floats(SHAPE), floats(SHAPE), floats(SHAPE, 10.0), masks)
def test_surrogates_over_any_mask(log_probs, old, advantages, mask):
    """However far the policies are apart: no worse than the clipped credit, and finite slopes."""
    unreduced = np.asarray(losses.clipped_surrogate_loss(log_probs, old, advantages))
    assert (unreduced >= -np.abs(advantages) * 1.2 - 1e-5).all()
    whole = np.asarray(losses.sequence_clipped_surrogate_loss(log_probs, old, advantages[:, 0], mask))
    assert (whole[~mask.any(1)] == 0).all() and (whole >= -np.abs(advantages[:, 0]) * 1.2 - 1e-5).all()
    slope = jax.grad(lambda x: losses.sequence_clipped_surrogate_loss(x, old, advantages[:, 0], mask).sum())(
        log_probs
    )
    assert np.isfinite(slope).all() and (np.asarray(slope)[~mask] == 0).all()
