"""Where learning from one's own samples leads: rejection sampling, weighted regression, online and iterative DPO.

Sampling is exact: every group of sequences counts with its probability. Derivations: docs/algorithms.md.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses
from rlhf_jax.evaluation import best_of_n
from rlhf_jax.stages import rejection

EXACT = 0.01  # total variation
REJECTION = rejection.Config(group_size=2, batch_size=2)


def reference_probabilities(world):
    return world.optimum(np.zeros_like(world.rewards))[0]


def tilted(world, inverse_temperature):
    """pi_ref exp(c r) / Z, in float64 numpy."""
    weights = reference_probabilities(world) * np.exp(inverse_temperature * world.rewards)
    return weights / weights.sum()


def distance(world, logits, target):
    return 0.5 * float(np.abs(np.asarray(world.probabilities(logits)) - target).sum())


def groups_of(world, size):
    """Every group of ``size`` sequences, [M, size]."""
    return np.array(list(itertools.product(range(len(world.rewards)), repeat=size)))


def group_probabilities(world, logits, groups):
    return jax.lax.stop_gradient(jnp.prod(world.probabilities(logits)[groups], axis=1))


def imitate_the_best(world, group_size):
    """RFT's expected loss under samples of the policy ``old``: -E log pi(the best of the group)."""
    groups = groups_of(world, group_size)
    config = dataclasses.replace(REJECTION, group_size=group_size)
    kept = rejection.kept(jnp.asarray(world.rewards[groups].reshape(-1)), config).reshape(groups.shape)

    def loss(logits, old):
        chosen = jnp.sum(jnp.where(kept, world.log_probs(logits)[groups], 0.0), axis=1)
        return -jnp.sum(group_probabilities(world, old, groups) * chosen)

    return loss


def test_one_round_of_rft_is_best_of_n_and_k_rounds_are_best_of_n_to_the_k(world, minimise):
    """F -> F^n, round for round, so that after k rounds F^(n^k): the argmax of the reward is where it ends."""
    loss, logits = imitate_the_best(world, 3), jnp.asarray(world.reference)
    start = reference_probabilities(world)
    for rounds in (1, 2):
        old = logits
        logits = minimise(lambda new, _: loss(new, old), old, steps=400, rate=0.1)  # noqa: B023
        expected = best_of_n.best_of_n_distribution(start, world.rewards, 3**rounds)
        assert distance(world, logits, expected) < EXACT, rounds
        # It is not the leashed optimum of the same KL, nor that of this world's leash.
        assert world.distance(logits) > 5 * EXACT


def test_the_limit_of_rft_is_the_best_response_whatever_the_step(world, minimise):
    """One update a round, as the stage does: only point masses are their own best-of-n, and the best one attracts."""
    loss = imitate_the_best(world, 2)
    logits = minimise(lambda new, _: loss(new, new), world.reference, steps=400, rate=0.1)
    assert float(world.probabilities(logits)[np.argmax(world.rewards)]) > 1 - EXACT


def test_reward_weighted_regression_tilts_once_a_round(world, minimise):
    """On the policy's own samples k rounds give pi_ref exp(k r / temperature): the leash wears off."""
    logits = jnp.asarray(world.reference)
    for rounds in (1, 2):
        old = logits

        def loss(new, _):
            unreduced = losses.reward_weighted_loss(
                world.log_probs(new), jnp.asarray(world.rewards), temperature=world.beta, max_weight=1e6
            )
            return jnp.sum(world.probabilities(old) * unreduced)  # noqa: B023

        logits = minimise(loss, old, steps=400, rate=0.1)
        assert distance(world, logits, tilted(world, rounds / world.beta)) < EXACT, rounds


@pytest.mark.parametrize("size", [2, 3])
def test_advantage_weighted_regression_on_groups(world, minimise, size):
    """The group's mean holds 1 / G of the own reward: the temperature is G / (G - 1) times the one asked for."""
    groups = groups_of(world, size)
    config = dataclasses.replace(REJECTION, kind="advantage", group_size=size)
    rows = jnp.asarray(world.rewards[groups].reshape(-1), jnp.float32)
    advantages = rejection.row_scores(rows, rows, rows, config)
    start = jnp.asarray(world.reference)

    def loss(logits, _):
        unreduced = losses.advantage_weighted_loss(
            world.log_probs(logits)[groups.reshape(-1)], advantages, temperature=world.beta, max_weight=1e6
        )
        return jnp.sum(
            group_probabilities(world, start, groups) * unreduced.reshape(groups.shape).sum(axis=1)
        )

    logits = minimise(loss, start, steps=400, rate=0.1)
    assert distance(world, logits, tilted(world, (size - 1) / size / world.beta)) < EXACT


def test_distribution_matching_arrives_from_its_own_samples(world, minimise):
    """The importance weights P / q undo whatever q samples: one target for every round."""
    ref = world.log_probs(jnp.asarray(world.reference))
    target = ref + world.rewards / world.beta
    target -= jax.nn.logsumexp(target)

    def loss(logits, _):
        log_probs = world.log_probs(logits)
        behaviour = jax.lax.stop_gradient(log_probs)
        unreduced = losses.distribution_matching_loss(log_probs, behaviour, target, max_weight=1e6)
        return jnp.sum(jnp.exp(behaviour) * unreduced)

    assert world.distance(minimise(loss, world.reference, steps=400, rate=0.1)) < EXACT


def pair_loss(world, prefer):
    """DPO's expected loss on pairs of the policy ``old``; ``prefer`` [N, N]: P(the first is preferred)."""

    def loss(logits, old, reference):
        weights = jax.lax.stop_gradient(world.probabilities(old))
        policy, ref = world.log_probs(logits), jax.lax.stop_gradient(world.log_probs(reference))
        first, second = (
            index.reshape(-1) for index in np.meshgrid(*[np.arange(len(ref))] * 2, indexing="ij")
        )
        pairs = losses.dpo_loss(policy[first], policy[second], ref[first], ref[second], beta=world.beta)
        return jnp.sum(weights[first] * weights[second] * prefer.reshape(-1) * pairs)

    return loss


def bradley_terry(world):
    return jax.nn.sigmoid(world.rewards[:, None] - world.rewards[None])


def test_online_dpo_with_a_judge_who_is_bradley_terry(world, minimise):
    """pi* minimises the loss of every pair at once, so that it does not matter who samples them."""
    loss, start = pair_loss(world, bradley_terry(world)), jnp.asarray(world.reference)
    logits = minimise(lambda new, _: loss(new, new, start), start, steps=500, rate=0.1)
    assert world.distance(logits) < EXACT


def test_online_dpo_with_a_judge_who_is_certain_has_no_leash(world, minimise):
    """The higher reward always wins, as in the stage: every pair asks for an endless margin, and beta stops nothing."""
    certain = jnp.asarray(world.rewards[:, None] > world.rewards[None], jnp.float32)
    loss, start = pair_loss(world, certain), jnp.asarray(world.reference)
    best = np.argmax(world.rewards)
    found = [
        float(
            world.probabilities(minimise(lambda new, _: loss(new, new, start), start, steps=steps, rate=0.1))[
                best
            ]
        )
        for steps in (100, 800)
    ]
    assert world.optimum()[0][best] + 0.1 < found[0] < found[1] and found[1] > 0.95


def test_iterative_dpo_against_its_last_policy_tilts_once_a_round(world, minimise):
    """reference="iteration": pi_ref exp(k r / beta) after k rounds; reference="start": pi* after any number."""
    loss, start = pair_loss(world, bradley_terry(world)), jnp.asarray(world.reference)
    moving = fixed = start
    for rounds in (1, 2):
        old, kept = moving, fixed
        moving = minimise(lambda new, _: loss(new, old, old), old, steps=800, rate=0.1)  # noqa: B023
        fixed = minimise(lambda new, _: loss(new, kept, start), kept, steps=800, rate=0.1)  # noqa: B023
        assert distance(world, moving, tilted(world, rounds / world.beta)) < EXACT, rounds
        assert world.distance(fixed) < EXACT, rounds
