"""The KL-leashed optimum pi* = pi_ref exp(r / beta) / Z, and the algorithms that have to arrive there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses, masking

EXACT, SAMPLED = 0.01, 0.03  # total variation


def objective(world, logits):
    """E r - beta KL, enumerated."""
    log_p, log_ref = world.log_probs(logits), world.log_probs(jnp.asarray(world.reference))
    return jnp.sum(jnp.exp(log_p) * (world.rewards - world.beta * (log_p - log_ref)))


def test_the_optimum_is_one(world):
    """First order: no slope at pi*. Value: beta log Z. Second: every step away is downhill."""
    with jax.enable_x64(True):
        best, log_normaliser = world.optimum()
        logits = jnp.asarray(world.logits_of(best))
        np.testing.assert_allclose(world.probabilities(logits), best, rtol=1e-9)
        np.testing.assert_allclose(jax.grad(lambda z: objective(world, z))(logits), 0.0, atol=1e-9)
        assert float(objective(world, logits)) == pytest.approx(world.beta * log_normaliser, rel=1e-7)
        for seed in range(5):
            step = 0.1 * np.random.default_rng(seed).standard_normal(logits.shape)
            assert float(objective(world, logits + step)) < world.beta * log_normaliser - 1e-5


def test_implicit_rewards_of_the_optimum(world):
    """Up to one constant, -beta log Z, they are the rewards."""
    with jax.enable_x64(True):
        best, log_normaliser = world.optimum()
        log_ref = world.log_probs(jnp.asarray(world.reference, jnp.float64))
        implicit = losses.implicit_rewards(jnp.log(jnp.asarray(best)), log_ref, beta=world.beta)
        np.testing.assert_allclose(world.rewards - implicit, world.beta * log_normaliser, rtol=1e-6)


def leashed_scores(world, logits):
    """r - beta (log pi - log pi_ref) of every sequence: constants."""
    k1 = losses.kl_k1(world.log_probs(logits), world.log_probs(jnp.asarray(world.reference)))
    return jax.lax.stop_gradient(world.rewards - world.beta * k1)


def test_reinforce(world, minimise):
    """Exact gradient: every sequence, weighted by its probability. Token credit by GAE at lambda 1 without a critic."""

    def loss(logits, _):
        log_probs = world.token_log_probs(logits)
        kl = losses.kl_k1(log_probs, world.token_log_probs(jnp.asarray(world.reference)))
        rewards = losses.kl_penalized_rewards(world.rewards, kl, world.mask, beta=world.beta)
        to_go, _ = losses.generalized_advantage_estimation(
            rewards, jnp.zeros_like(rewards), world.mask, gamma=1.0, lam=1.0
        )
        weights = jax.lax.stop_gradient(world.probabilities(logits))
        unreduced = losses.reinforce_loss(log_probs, to_go)
        return jnp.sum(weights * masking.masked_sum(unreduced, world.mask, axis=1))

    assert world.distance(minimise(loss, world.reference, steps=400, rate=0.05)) < EXACT


def test_dpo_on_the_bradley_terry_population(world, minimise):
    """Every ordered pair, weighted by how often a Bradley-Terry judge of the same rewards prefers it that way."""
    n = len(world.rewards)
    first, second = (index.reshape(-1) for index in np.meshgrid(np.arange(n), np.arange(n)))
    preferred = jax.nn.sigmoid(world.rewards[first] - world.rewards[second])
    ref = world.log_probs(jnp.asarray(world.reference))

    def loss(logits, _):
        policy = world.log_probs(logits)
        pairs = losses.dpo_loss(policy[first], policy[second], ref[first], ref[second], beta=world.beta)
        return jnp.mean(preferred * pairs)

    assert world.distance(minimise(loss, world.reference, steps=500, rate=0.1)) < EXACT


def test_distribution_matching(world, minimise):
    """GDC: samples of the reference, weighted by P / q; its fixed point is the normalised P."""
    ref = world.log_probs(jnp.asarray(world.reference))
    target = ref + world.rewards / world.beta

    def loss(logits, _):
        unreduced = losses.distribution_matching_loss(world.log_probs(logits), ref, target, max_weight=1e6)
        return jnp.sum(jnp.exp(ref) * unreduced)

    assert world.distance(minimise(loss, world.reference, steps=400, rate=0.1)) < EXACT


def test_reward_weighted_regression(world, minimise):
    """On the reference's samples, weights exp(r / beta) lead to the same place."""
    ref = world.log_probs(jnp.asarray(world.reference))

    def loss(logits, _):
        unreduced = losses.reward_weighted_loss(
            world.log_probs(logits), jnp.asarray(world.rewards), temperature=world.beta, max_weight=1e6
        )
        return jnp.sum(jnp.exp(ref) * unreduced)

    assert world.distance(minimise(loss, world.reference, steps=400, rate=0.1)) < EXACT


def sample(world, logits, key, count):
    return jax.random.categorical(key, jax.lax.stop_gradient(world.log_probs(logits)), shape=(count,))


def test_rloo(world, minimise):
    """64 prompts, 4 responses each; the KL is in the reward."""

    def loss(logits, key):
        drawn = sample(world, logits, key, 256)
        scores = leashed_scores(world, logits)[drawn].reshape(64, 4)
        advantages = losses.leave_one_out_advantages(scores).reshape(-1)
        return losses.reinforce_loss(world.log_probs(logits)[drawn], advantages).mean()

    logits = minimise(loss, world.reference, steps=1500, rate=0.03, key=jax.random.key(0))
    assert world.distance(logits) < SAMPLED


def test_grpo(world, minimise):
    """The KL in the reward: at pi* every leashed score is the same, so every group is without spread."""

    def loss(logits, key):
        drawn = sample(world, logits, key, 256)
        scores = leashed_scores(world, logits)[drawn].reshape(32, 8)
        advantages = losses.group_relative_advantages(scores).reshape(-1)
        log_probs = world.token_log_probs(logits)[drawn]
        mask = jnp.asarray(world.mask)[drawn]
        tokens = losses.clipped_surrogate_loss(
            log_probs, jax.lax.stop_gradient(log_probs), jnp.broadcast_to(advantages[:, None], mask.shape)
        )
        return masking.fixed_length_mean(tokens, mask, length=world.tokens.shape[1]).mean()

    logits = minimise(loss, world.reference, steps=1500, rate=0.03, key=jax.random.key(1))
    assert world.distance(logits) < SAMPLED


@pytest.mark.parametrize(
    "estimator, arrives", [(losses.kl_k2, True), (losses.kl_k3, False)], ids=["k2", "k3"]
)
def test_a_kl_in_the_loss_needs_the_right_gradient(world, minimise, estimator, arrives):
    """Unscaled advantages and a KL term beside them: k2 arrives at pi*; k3, whose gradient is the forward KL's, does
    not, and neither does anything with a group mean unless beta is corrected by (G - 1) / G (docs/numerics.md)."""
    ref = world.log_probs(jnp.asarray(world.reference))

    def loss(logits, _):
        log_probs = world.log_probs(logits)
        weights = jax.lax.stop_gradient(jnp.exp(log_probs))
        advantages = world.rewards - jnp.sum(weights * world.rewards)
        unreduced = losses.reinforce_loss(log_probs, advantages) + world.beta * estimator(log_probs, ref)
        return jnp.sum(weights * unreduced)

    distance = world.distance(minimise(loss, world.reference, steps=500, rate=0.05))
    assert distance < EXACT if arrives else distance > 5 * EXACT


def test_ppo(world, minimise):
    """Tabular critic, GAE, whitened advantages, two clipped epochs a batch."""
    prefixes, mask, tokens = (jnp.asarray(x) for x in (world.prefixes, world.mask, world.tokens))
    ref = jnp.asarray(world.reference)
    count, rate, steps = 256, 0.03, 800

    def update(carry, i):
        (logits, values), moments = carry
        old_table = logits
        drawn = sample(world, old_table, jax.random.fold_in(jax.random.key(2), i), count)
        here, there = mask[drawn], prefixes[drawn]
        old = losses.token_log_probs(old_table[there], tokens[drawn])
        kl = losses.kl_k1(old, losses.token_log_probs(ref[there], tokens[drawn]))
        rewards = losses.kl_penalized_rewards(jnp.asarray(world.rewards)[drawn], kl, here, beta=world.beta)
        old_values = values[there]
        advantages, returns = losses.generalized_advantage_estimation(
            rewards, old_values, here, gamma=1.0, lam=0.95
        )
        advantages = masking.masked_whiten(advantages, here)

        def loss(params):
            logits, values = params
            new = losses.token_log_probs(logits[there], tokens[drawn])
            policy = losses.clipped_surrogate_loss(new, old, advantages)
            value = losses.clipped_value_loss(values[there], old_values, returns, clip=0.2)
            return masking.token_mean(policy + value, here).mean()

        params = logits, values
        for _ in range(2):
            gradients = jax.grad(loss)(params)
            params, moments = adam(params, gradients, moments, rate * (1 - i / steps))
        return (params, moments), None

    start = (ref, jnp.zeros(ref.shape[0]))
    moments = (jax.tree.map(jnp.zeros_like, start), jax.tree.map(jnp.zeros_like, start), 0)
    ((logits, _), _), _ = jax.jit(lambda c: jax.lax.scan(update, c, jnp.arange(steps)))((start, moments))
    assert world.distance(logits) < SAMPLED


def adam(params, gradients, moments, rate):
    first, second, count = moments
    count = count + 1
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradients)
    corrected = rate * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
    params = jax.tree.map(lambda p, m, v: p - corrected * m / (jnp.sqrt(v) + 1e-8), params, first, second)
    return params, (first, second, count)
