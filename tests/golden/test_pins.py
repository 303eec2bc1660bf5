"""Numbers that peers publish, for which there is no package to run: each names its source."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses, masking

ONE_TWO_THREE = np.array([[1.0, 2.0, 3.0]], np.float32)
ALL = np.ones((1, 3), bool)


def test_nemo_clipped_surrogate():
    """NeMo RL 7ea279a, tests/unit/algorithms/test_loss_functions.py: ratios .5, 1, 1.5 and advantages 1, -1, 2."""
    log_ratios = np.log(np.array([[0.5, 1.0, 1.5]], np.float32))
    advantages = np.array([[1.0, -1.0, 2.0]], np.float32)
    unreduced = losses.clipped_surrogate_loss(log_ratios, np.zeros((1, 3), np.float32), advantages)
    assert float(masking.token_mean(unreduced, ALL).mean()) == pytest.approx(-0.6333, abs=1e-4)


def test_nemo_kl_estimators():
    """The same file: log-prob -1, reference 0, -15, -30."""
    policy, ref = np.full(3, -1.0, np.float32), np.array([0.0, -15.0, -30.0], np.float32)
    np.testing.assert_allclose(losses.kl_k1(policy, ref), [-1.0, 14.0, 29.0], rtol=1e-6)
    np.testing.assert_allclose(losses.kl_k2(policy, ref), [0.5, 98.0, 420.5], rtol=1e-6)
    np.testing.assert_allclose(losses.kl_k3(policy, ref), [0.7183, 13.0, 28.0], atol=5e-5)


def test_nemo_generalized_advantage_estimation():
    """NeMo RL 7ea279a, tests/unit/algorithms/test_ppo.py: lambda 0, reward 5 at the end, values 1, 2, 3."""
    rewards, values = np.array([[0.0, 0.0, 5.0]], np.float32), ONE_TWO_THREE
    advantages, _ = losses.generalized_advantage_estimation(rewards, values, ALL, gamma=1.0, lam=0.0)
    np.testing.assert_allclose(advantages, [[1.0, 1.0, 2.0]])


def test_nemo_group_advantages_leave_the_response_out_of_mean_and_spread():
    """NeMo RL 7ea279a, advantage_estimator.py: -2.1213, 0, 2.1213 of [1, 2, 3], from our leave-one-out and a std."""
    rewards = ONE_TWO_THREE[0]
    spread = np.array([np.std(np.delete(rewards, i), ddof=1) for i in range(3)])
    theirs = np.asarray(losses.leave_one_out_advantages(ONE_TWO_THREE))[0] / spread
    np.testing.assert_allclose(theirs, [-2.1213, 0.0, 2.1213], atol=1e-4)


def test_open_instruct_group_advantages():
    """open-instruct e6c3044: "centered" is scale=False; "standard" divides by the population std, 1.22474."""
    centred = losses.group_relative_advantages(ONE_TWO_THREE, scale=False)
    np.testing.assert_allclose(centred, [[-1.0, 0.0, 1.0]])
    population = losses.group_relative_advantages(ONE_TWO_THREE, epsilon=1e-12) * np.sqrt(
        3 / 2, dtype=np.float32
    )
    np.testing.assert_allclose(population, [[-1.22474, 0.0, 1.22474]], atol=1e-5)


def test_openrlhf_group_advantages():
    """OpenRLHF 3c3be62, experience_maker.py: n - 1 and 1e-9, so exactly -1, 0, 1."""
    ours = losses.group_relative_advantages(ONE_TWO_THREE, epsilon=1e-9)
    np.testing.assert_allclose(ours, [[-1.0, 0.0, 1.0]], atol=1e-7)


def test_reward_slot():
    """EOS at index 1 of 4, score 1, gamma 1, lambda .95, V = 0: the others' [.95, 1, 0, 0]; TRL f2cd577's
    [.9025, .95, 1, 0] pays the score one slot late, on the first pad, which is a mask one token longer."""
    zeros = np.zeros((1, 4), np.float32)
    for length, expected in [(2, [0.95, 1.0, 0.0, 0.0]), (3, [0.9025, 0.95, 1.0, 0.0])]:
        mask = np.arange(4)[None] < length
        rewards = losses.kl_penalized_rewards(np.ones(1, np.float32), zeros, mask, beta=0.1)
        advantages, _ = losses.generalized_advantage_estimation(rewards, zeros, mask, gamma=1.0, lam=0.95)
        np.testing.assert_allclose(advantages, [expected], rtol=1e-6)


def test_length_normalised_ipo():
    """beta .1, log-ratio 2 over 4 tokens against -1 over 2: 16 per token (TRL), 4 summed (the paper, OpenRLHF)."""
    chosen, rejected = (
        np.array([[0.5, 0.5, 0.5, 0.5]], np.float32),
        np.array([[-0.5, -0.5, 0, 0]], np.float32),
    )
    masks = np.ones((1, 4), bool), np.array([[True, True, False, False]])
    zero = np.zeros(1, np.float32)
    for reduce, expected in [(losses.sequence_mean_log_probs, 16.0), (losses.sequence_log_probs, 4.0)]:
        loss = losses.ipo_loss(reduce(chosen, masks[0]), reduce(rejected, masks[1]), zero, zero, beta=0.1)
        assert float(loss[0]) == pytest.approx(expected, rel=1e-5)


def test_three_answers_to_noisy_labels():
    """beta Delta = 1, eps = .1: sigmoid .313262, conservative .413262, robust .188262."""
    four = np.ones(1, np.float32), *(np.zeros(1, np.float32),) * 3
    ours = [
        losses.dpo_loss(*four, beta=1.0),
        losses.dpo_loss(*four, beta=1.0, label_smoothing=0.1),
        losses.robust_dpo_loss(*four, beta=1.0, label_smoothing=0.1),
    ]
    np.testing.assert_allclose(jnp.concatenate(ours), [0.313262, 0.413262, 0.188262], atol=1e-6)


def test_openai_adaptive_beta():
    """Ziegler et al. (2019) and lm-human-preferences: at most a fifth of batch_size / horizon a step, either way."""
    options = {"target": 6.0, "horizon": 10_000, "batch_size": 512}
    for observed, error in [(60.0, 0.2), (0.0, -0.2), (6.6, 0.1), (6.0, 0.0)]:
        ours = losses.adaptive_beta(0.15, observed, **options)
        assert float(ours) == pytest.approx(0.15 * (1 + error * 512 / 10_000), rel=1e-6)


def test_k3_of_one_nat():
    """rlhf-book, code/tests/test_kl3_stability.py: e - 2; and near 0 the expm1 form keeps d^2 / 2."""
    zero = np.zeros(1, np.float32)
    assert float(losses.kl_k3(zero, np.ones(1, np.float32))[0]) == pytest.approx(np.e - 2, rel=1e-6)
    small = np.array([1e-3], np.float32)
    assert float(losses.kl_k3(zero, small)[0]) == pytest.approx(5e-7, rel=2e-3, abs=2e-10)
