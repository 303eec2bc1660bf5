"""Policy losses: by hand, where the clip bites, and the recipes as compositions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses, masking


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",
    [
        (1.0, 1.0, -1.0, -1.0),
        (1.1, 1.0, -1.1, -1.1),  # within: full gradient, -A rho
        (1.5, 1.0, -1.28, 0.0),  # too likely already, and good: clipped
        (1.5, -1.0, 1.5, 1.5),  # too likely and bad: pulled back
        (0.5, 1.0, -0.5, -0.5),  # too rare and good: pulled back
        (0.5, -1.0, 0.8, 0.0),  # too rare already, and bad: clipped
    ],
)
def test_where_the_clip_bites(ratio, advantage, loss, slope):
    def of(log_prob):
        return losses.clipped_surrogate_loss(
            log_prob, jnp.zeros((1, 1)), jnp.full((1, 1), advantage), clip_low=0.2, clip_high=0.28
        ).sum()

    value, gradient = jax.value_and_grad(of)(jnp.log(jnp.full((1, 1), ratio)))
    assert float(value) == pytest.approx(loss, rel=1e-6) and float(gradient[0, 0]) == pytest.approx(
        slope, rel=1e-6
    )


@pytest.mark.parametrize("gap", [25.0, 2e4])
def test_the_ratio_is_bounded(gap):
    """Log-ratios beyond 20 count as 20 and have no slope, whatever the advantage's sign."""
    value, slope = jax.value_and_grad(
        lambda x: losses.clipped_surrogate_loss(x, jnp.zeros((1, 1)), -jnp.ones((1, 1))).sum()
    )(jnp.full((1, 1), gap))
    assert float(value) == pytest.approx(np.exp(20.0), rel=1e-5) and float(slope[0, 0]) == 0.0


def test_sequence_ratio_by_hand():
    """Ratios 2 and 1/2 make 1; 4 and 1 make 2, clipped at 1.2."""
    log_probs = jnp.log(jnp.array([[2.0, 0.5, 9.0], [4.0, 1.0, 9.0]]))
    mask = jnp.array([[True, True, False]] * 2)
    ours = losses.sequence_clipped_surrogate_loss(log_probs, jnp.zeros((2, 3)), jnp.array([3.0, 1.0]), mask)
    np.testing.assert_allclose(ours, [-3.0, -1.2], rtol=1e-6)


def test_one_advantage_a_response_or_a_token():
    """Equal advantages: GSPO and GSPO-token have the same loss and the same gradient (Zheng et al. 2025, sec. 4.3)."""
    rng = np.random.default_rng(0)
    log_probs, old = rng.standard_normal((2, 3, 4)).astype(np.float32) * 0.1
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    advantages = rng.standard_normal(3).astype(np.float32)
    wide = np.broadcast_to(advantages[:, None], (3, 4))

    def by_response(x):
        return losses.sequence_clipped_surrogate_loss(x, old, advantages, mask)[:2].mean()

    def by_token(x):
        unreduced = losses.sequence_clipped_surrogate_loss(x, old, wide, mask)
        return masking.sequence_mean_of_token_means(unreduced, mask).mean()

    (value, gradient), (other, other_gradient) = (
        jax.value_and_grad(f)(log_probs) for f in (by_response, by_token)
    )
    assert float(value) == pytest.approx(float(other), rel=1e-6)
    np.testing.assert_allclose(gradient, other_gradient, rtol=1e-5, atol=1e-7)


def test_refused_advantages():
    x, mask = np.zeros((2, 3), np.float32), np.ones((2, 3), bool)
    with pytest.raises(ValueError, match="advantages must have one entry a row of log_probs, 2, got 3"):
        losses.sequence_clipped_surrogate_loss(x, x, np.zeros(3, np.float32), mask)
    with pytest.raises(
        ValueError, match=r"advantages must have the shape of log_probs, \[2, 3\], got \[2, 4\]"
    ):
        losses.sequence_clipped_surrogate_loss(x, x, np.zeros((2, 4), np.float32), mask)


def test_on_policy_surrogate_has_reinforce_gradient():
    """At pi = pi_old the ratio is 1 and its slope the score: PPO's first step is REINFORCE's."""
    rng = np.random.default_rng(1)
    log_probs, advantages = rng.standard_normal((2, 3, 4)).astype(np.float32)
    ppo = jax.grad(lambda x: losses.clipped_surrogate_loss(x, log_probs, advantages).sum())(log_probs)
    reinforce = jax.grad(lambda x: losses.reinforce_loss(x, advantages).sum())(log_probs)
    np.testing.assert_allclose(ppo, reinforce, rtol=1e-6)


def test_weights_are_exponential_and_capped():
    log_probs, signal = np.full(3, -1.0, np.float32), np.array([0.0, 1.0, 1e6], np.float32)
    for function in (losses.advantage_weighted_loss, losses.reward_weighted_loss):
        ours = function(log_probs, signal, temperature=0.5, max_weight=20.0)
        np.testing.assert_allclose(ours, [1.0, np.exp(2.0), 20.0], rtol=1e-5)
    ours = losses.distribution_matching_loss(log_probs, np.zeros(3, np.float32), signal, max_weight=20.0)
    np.testing.assert_allclose(ours, [1.0, np.e, 20.0], rtol=1e-5)


def test_recipes():
    """DAPO weighs tokens, GRPO responses, Dr. GRPO neither: one bad long and one good short response, by hand."""
    mask = np.array([[1, 1, 1, 1], [1, 0, 0, 0]], bool)
    x = np.zeros((2, 4), np.float32)
    rewards = np.array([[0.0, 1.0]], np.float32)
    normalised = np.asarray(losses.group_relative_advantages(rewards, epsilon=1e-9))[0]
    centred = np.asarray(losses.group_relative_advantages(rewards, scale=False))[0]

    def recipe(advantages, reduce, **clips):
        wide = np.broadcast_to(advantages[:, None], (2, 4))
        return float(reduce(losses.clipped_surrogate_loss(x, x, wide, **clips), mask).mean())

    a = 1 / np.sqrt(2)
    assert recipe(normalised, masking.sequence_mean_of_token_means) == pytest.approx(0.0, abs=1e-6)
    assert recipe(normalised, masking.token_mean, clip_low=0.2, clip_high=0.28) == pytest.approx(
        3 * a / 5, rel=1e-6
    )
    dr = recipe(centred, lambda loss, mask: masking.fixed_length_mean(loss, mask, length=4))
    assert dr == pytest.approx((4 * 0.5 - 0.5) / 8, rel=1e-6)


def test_entropy_bonus_is_a_composition():
    """Its gradient alone raises the entropy."""
    logits = jnp.array([[[0.0, 2.0, -1.0]]])
    mask = jnp.ones((1, 1), bool)

    def loss(z):
        surrogate = losses.reinforce_loss(losses.token_log_probs(z, jnp.array([[1]])), jnp.zeros((1, 1)))
        return masking.token_mean(surrogate - 0.1 * losses.token_entropy(z), mask).mean()

    step = logits - jax.grad(loss)(logits)
    assert float(losses.token_entropy(step)[0, 0]) > float(losses.token_entropy(logits)[0, 0]) + 1e-3
