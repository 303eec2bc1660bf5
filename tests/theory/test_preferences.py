"""What comparisons can and cannot tell: DPO's weights, Bradley-Terry's constant, and Goodhart's law."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import losses


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def test_dpo_gradient_is_weighted_by_how_wrong_the_implicit_reward_is():
    """Rafailov et al. (2023), section 4: -beta sigmoid(r_l - r_w) on the chosen, plus it on the rejected."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        chosen, rejected, ref_chosen, ref_rejected = rng.standard_normal((4, 6))
        beta = 0.3
        gradient = jax.grad(
            lambda *pair: losses.dpo_loss(*pair, ref_chosen, ref_rejected, beta=beta).sum(), (0, 1)
        )
        weight = beta * sigmoid(beta * (rejected - ref_rejected) - beta * (chosen - ref_chosen))
        for_chosen, for_rejected = gradient(chosen, rejected)
        np.testing.assert_allclose(for_chosen, -weight, rtol=1e-12)
        np.testing.assert_allclose(for_rejected, weight, rtol=1e-12)


def test_robust_dpo_averages_to_clean_dpo():
    """Chowdhury et al. (2024): over labels flipped with probability eps, its mean is DPO's loss on true labels."""
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        w, l, rw, rl = rng.standard_normal((4, 5))  # noqa: E741
        options = {"beta": 0.7, "label_smoothing": 0.2}
        kept = losses.robust_dpo_loss(w, l, rw, rl, **options)
        flipped = losses.robust_dpo_loss(l, w, rl, rw, **options)
        np.testing.assert_allclose(
            0.8 * kept + 0.2 * flipped, losses.dpo_loss(w, l, rw, rl, beta=0.7), rtol=1e-12
        )


def fit(loss, start, steps=400):
    optimiser = optax.adam(optax.linear_schedule(0.1, 0.001, steps))

    def step(carry, _):
        x, state = carry
        updates, state = optimiser.update(jax.grad(loss)(x), state)
        return (x + updates, state), None

    start = jnp.asarray(start)
    return np.asarray(
        jax.jit(lambda c: jax.lax.scan(step, c, None, length=steps))((start, optimiser.init(start)))[0][0]
    )


LATENT = np.array([0.0, 1.0, -0.7, 2.0])


def population_loss(rewards):
    """Bradley-Terry on every ordered pair, as often as a judge with the latent scores picks it."""
    i, j = np.nonzero(~np.eye(4, dtype=bool))
    return jnp.sum(sigmoid(LATENT[i] - LATENT[j]) * losses.bradley_terry_loss(rewards[i], rewards[j]))


@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_bradley_terry_recovers_scores_up_to_one_constant(offset):
    """Differences come back; the sum stays where it started, because no gradient ever points along it."""
    with jax.enable_x64(True):
        start = np.array([0.3, -0.1, 0.4, 0.2]) + offset
        fitted = fit(population_loss, start)
        np.testing.assert_allclose(fitted - fitted[0], LATENT - LATENT[0], atol=1e-3)
        assert abs(float(jax.grad(population_loss)(jnp.asarray(start)).sum())) < 1e-12
        assert float(population_loss(jnp.asarray(fitted))) == pytest.approx(
            float(population_loss(jnp.asarray(fitted + 7.0))), rel=1e-12
        )


def test_the_best_agreement_is_below_one():
    """Even the true scores agree with their own judge less than always; accuracy plateaus there."""
    i, j = np.nonzero(~np.eye(4, dtype=bool))
    best = np.maximum(sigmoid(LATENT[i] - LATENT[j]), sigmoid(LATENT[j] - LATENT[i])).mean()
    with jax.enable_x64(True):
        fitted = fit(population_loss, np.zeros(4))
    agreement = np.where(
        fitted[i] > fitted[j], sigmoid(LATENT[i] - LATENT[j]), sigmoid(LATENT[j] - LATENT[i])
    ).mean()
    assert agreement == pytest.approx(best)
    assert best < 0.81


def test_plackett_luce_recovers_scores_from_whole_rankings():
    """All 24 rankings of four responses, each as likely as drawing without replacement makes it."""
    orders = np.array(list(itertools.permutations(range(4))))
    weights = np.exp(LATENT)
    probability = np.ones(len(orders))
    for n, order in enumerate(orders):
        for k in range(4):
            probability[n] *= weights[order[k]] / weights[order[k:]].sum()
    assert probability.sum() == pytest.approx(1.0)
    ranks = np.argsort(orders, axis=1)

    def loss(rewards):
        every = losses.plackett_luce_loss(
            jnp.broadcast_to(rewards[None], ranks.shape), ranks, np.ones(ranks.shape, bool)
        )
        return jnp.sum(probability * every)

    with jax.enable_x64(True):
        fitted = fit(loss, np.zeros(4))
        np.testing.assert_allclose(fitted - fitted[0], LATENT - LATENT[0], atol=1e-3)
        entropy = -np.sum(probability * np.log(probability))
        assert float(loss(jnp.asarray(fitted))) == pytest.approx(entropy, rel=1e-5)


def test_goodhart(world):
    """Proxy = gold + independent noise: the proxy's optimum scores higher by the proxy than by gold, and the gap
    grows at every step down in beta; averaged over 200 draws of the noise."""
    rng = np.random.default_rng(3)
    gold = world.rewards.astype(np.float64)
    ref = np.exp(np.asarray(world.log_probs(jnp.asarray(world.reference)), np.float64))
    betas = [4.0, 2.0, 1.0, 0.5, 0.25]
    gaps = np.zeros((200, len(betas)))
    for draw in range(len(gaps)):
        proxy = gold + rng.standard_normal(len(gold))
        for k, beta in enumerate(betas):
            weights = ref * np.exp((proxy - proxy.max()) / beta)
            optimum = weights / weights.sum()
            gaps[draw, k] = optimum @ (proxy - gold) - ref @ (proxy - gold)
            if (
                draw < 3
            ):  # the library sees these optima as what they are: implicit reward = proxy - beta log Z
                implicit = losses.implicit_rewards(np.log(optimum), np.log(ref / ref.sum()), beta=beta)
                assert np.ptp(np.asarray(implicit) - proxy) < 1e-4
    mean, error = gaps.mean(0), gaps.std(0) / np.sqrt(len(gaps))
    assert (mean > 5 * error).all()
    assert (np.diff(mean) > 3 * error[1:]).all()
