"""A language small enough to enumerate: three tokens, of which one ends the sequence, and at most three of them."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import losses

V, T, EOS = 3, 3, 0


@dataclasses.dataclass(frozen=True)
class World:
    """All N sequences with their masks, a reference policy, a reward for each sequence, and the leash.

    A policy is a table of logits [prefixes, V]; ``prefixes`` [N, T] says which row predicts which token.
    """

    tokens: np.ndarray
    mask: np.ndarray
    prefixes: np.ndarray
    reference: np.ndarray
    rewards: np.ndarray
    beta: float

    def token_log_probs(self, logits):
        return losses.token_log_probs(logits[self.prefixes], self.tokens)

    def log_probs(self, logits):
        return losses.sequence_log_probs(self.token_log_probs(logits), self.mask)

    def probabilities(self, logits):
        return jnp.exp(self.log_probs(logits))

    def optimum(self, rewards=None):
        """pi* = pi_ref exp(r / beta) / Z, in float64 numpy, and log Z."""
        weights = np.exp(
            reference_log_probs(self) + (self.rewards if rewards is None else rewards) / self.beta
        )
        return weights / weights.sum(), float(np.log(weights.sum()))

    def logits_of(self, probabilities):
        """The table that gives these sequence probabilities: conditional log-probabilities per prefix."""
        table = np.zeros(self.reference.shape)
        for n, t in np.ndindex(*self.tokens.shape):
            if self.mask[n, t]:
                table[self.prefixes[n, t], self.tokens[n, t]] += probabilities[n]
        return np.log(np.maximum(table, 1e-300) / np.maximum(table.sum(1, keepdims=True), 1e-300))

    def distance(self, logits):
        """Total variation between a policy and the optimum."""
        return 0.5 * float(np.abs(np.asarray(self.probabilities(logits)) - self.optimum()[0]).sum())


def reference_log_probs(world):
    """log pi_ref of each sequence, by loops over float64: not through the functions under test."""
    out = np.zeros(len(world.tokens))
    for n, t in np.ndindex(*world.tokens.shape):
        if world.mask[n, t]:
            row = world.reference[world.prefixes[n, t]].astype(np.float64)
            out[n] += row[world.tokens[n, t]] - np.log(np.exp(row).sum())
    return out


def enumerate_sequences():
    """Every sequence that ends with its first EOS or at T tokens; padded with EOS, mask from length."""
    found = {}
    for word in itertools.product(range(V), repeat=T):
        end = word.index(EOS) + 1 if EOS in word else T
        found[word[:end]] = None
    return list(found)


@pytest.fixture(scope="session")
def world():
    rng = np.random.default_rng(4)
    sequences = enumerate_sequences()
    prefixes = {
        prefix: i for i, prefix in enumerate(sorted({s[:t] for s in sequences for t in range(len(s))}))
    }
    tokens = np.full((len(sequences), T), EOS, np.int32)
    mask = np.zeros((len(sequences), T), bool)
    table = np.zeros((len(sequences), T), np.int32)
    for n, sequence in enumerate(sequences):
        tokens[n, : len(sequence)], mask[n, : len(sequence)] = sequence, True
        table[n, : len(sequence)] = [prefixes[sequence[:t]] for t in range(len(sequence))]
    return World(
        tokens=tokens,
        mask=mask,
        prefixes=table,
        reference=0.7 * rng.standard_normal((len(prefixes), V)),
        rewards=rng.standard_normal(len(sequences)),
        beta=0.5,
    )


@pytest.fixture(scope="session")
def minimise():
    """``minimise(loss, start, steps, rate, key)``: Adam with a linearly falling rate over ``loss(logits, key)``."""

    def run(loss, start, *, steps, rate, key=None):
        optimiser = optax.adam(optax.linear_schedule(rate, rate / 100, steps))

        def step(carry, i):
            logits, state = carry
            gradient = jax.grad(loss)(logits, None if key is None else jax.random.fold_in(key, i))
            updates, state = optimiser.update(gradient, state)
            return (optax.apply_updates(logits, updates), state), None

        start = jnp.asarray(start)
        (logits, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(steps)))(
            (start, optimiser.init(start))
        )
        return logits

    return run
