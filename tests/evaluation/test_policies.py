"""Summaries by hand, best-of-n against enumeration, and sequence KL against the KL of all sequences there are."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.evaluation import policies
from rlhf_jax.evaluation.policies import Sample
from rlhf_jax.models import decoder
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.training.forward import response_log_probs
from rlhf_jax.types import Rollout


def sample(response="a b", proxy=0.0, gold=0.0, kl=0.0, length=2, terminated=True):
    return Sample(
        prompt="p", response=response, proxy=proxy, gold=gold, kl=kl, length=length, terminated=terminated
    )


def test_a_summary_by_hand():
    found = policies.summarize(
        [
            sample("a b a", proxy=1.0, gold=1.0, kl=0.5, length=4, terminated=True),
            sample("a b", proxy=2.0, gold=2.0, kl=1.5, length=2, terminated=False),
            sample("c", proxy=-6.0, gold=6.0, kl=4.0, length=3, terminated=True),
        ]
    )
    # Bigrams: ab ba | ab | none. Gold: mean 3, deviations -2 -1 3, so variance 14 / 2.
    assert found == {
        "proxy": -1.0,
        "kl": 2.0,
        "length": 3.0,
        "distinct_2": pytest.approx(2 / 3),
        "terminated": pytest.approx(2 / 3),
        "gold": 3.0,
        "gold_std": pytest.approx(math.sqrt(7)),
    }


def test_without_gold_there_is_none_in_the_summary():
    found = policies.summarize([sample(gold=None), sample(gold=None)])
    assert set(found) == {"proxy", "kl", "length", "distinct_2", "terminated"}


def test_best_of_n_takes_the_highest_proxy_and_the_first_of_equals():
    first = [sample("one", proxy=1.0, gold=9.0), sample("two", proxy=3.0), sample("three", proxy=3.0)]
    second = [sample("four", proxy=-1.0), sample("five", proxy=-2.0, gold=9.0)]
    assert [best.response for best in policies.best_of_n([first, second])] == ["two", "four"]


def best_of_n_kl_by_enumeration(probabilities, n):
    """KL(best of n || policy) over outcomes listed from worst to best: P(best is i) = F_i^n - F_{i-1}^n."""
    total, below = 0.0, 0.0
    for p in probabilities:
        best = (below + p) ** n - below**n
        total += best * math.log(best / p)
        below += p
    return total


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_best_of_n_kl_against_enumeration(n):
    outcomes = np.random.default_rng(n).dirichlet(np.ones(12)).tolist()
    # With few outcomes draws tie and the bound is above; with many unlikely ones it is met.
    assert best_of_n_kl_by_enumeration(outcomes, n) <= policies.best_of_n_kl(n) + 1e-12
    many = [1 / 50_000] * 50_000
    assert best_of_n_kl_by_enumeration(many, n) == pytest.approx(policies.best_of_n_kl(n), abs=1e-3)


def test_best_of_one_is_the_policy_itself():
    assert policies.best_of_n_kl(1) == 0.0


MODEL = ModelConfig(
    vocab_size=4, width=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=8, max_length=8
)
EOS, RESPONSE = 0, 3


def every_sequence() -> Rollout:
    """A rollout of every response there is to one prompt: those that end with EOS, and those cut at three tokens."""
    rows = []
    for length in range(1, RESPONSE + 1):
        for tokens in itertools.product(range(4), repeat=length):
            ended = tokens[-1] == EOS
            if EOS not in tokens[:-1] and (ended or length == RESPONSE):
                rows.append((tokens, length, ended))
    padded = np.array([[3, 1, *tokens, *[2] * (RESPONSE - length)] for tokens, length, _ in rows], np.int32)
    mask = np.array([[t < length for t in range(RESPONSE)] for _, length, _ in rows])
    return Rollout(
        tokens=jnp.asarray(padded),
        token_mask=jnp.asarray(np.concatenate([np.ones((len(rows), 2), bool), mask], axis=1)),
        response_mask=jnp.asarray(mask),
        log_probs=jnp.zeros(mask.shape),
        terminated=jnp.asarray([ended for _, _, ended in rows]),
        policy_step=jnp.int32(0),
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sequence_kl_averages_to_the_kl_between_all_sequences(temperature):
    # Sharper than at initialisation, so that the two policies differ by whole nats.
    policy, reference = (
        jax.tree.map(
            lambda x: 4.0 * x, {"decoder": decoder.init_params(MODEL, jax.random.key(seed))["decoder"]}
        )
        for seed in (0, 1)
    )
    rollout = every_sequence()
    assert rollout.tokens.shape[0] == 1 + 3 + 9 * 4
    log_probs = jax.jit(lambda params: response_log_probs(MODEL, params, rollout, temperature=temperature)[0])
    kl = jax.jit(lambda p, q: policies.sequence_full_kl(MODEL, p, q, rollout, temperature))
    log_p, log_q = (np.asarray(log_probs(params), np.float64).sum(axis=1) for params in (policy, reference))
    p = np.exp(log_p)
    assert p.sum() == pytest.approx(1.0, abs=1e-5) and np.exp(log_q).sum() == pytest.approx(1.0, abs=1e-5)
    along = np.asarray(kl(policy, reference), np.float64)
    exact = (p * (log_p - log_q)).sum()
    assert exact > 0.1
    assert (p * along).sum() == pytest.approx(exact, rel=1e-4)
    # Less variance than the log ratio has, and never below 0.
    assert along.min() >= 0.0
    assert (p * (along - exact) ** 2).sum() < (p * (log_p - log_q - exact) ** 2).sum()
    np.testing.assert_allclose(np.asarray(kl(policy, policy)), 0.0, atol=1e-6)
