"""Every loss against a float64 oracle of loops and `math`, written here from the papers' equations."""

import math

import jax
import numpy as np
import pytest

from rlhf_jax import losses


def sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def minus_log_sigmoid(x):
    return math.log1p(math.exp(-x)) if x >= 0 else -x + math.log1p(math.exp(x))


def log_normaliser(logits):
    peak = max(logits)
    return peak + math.log(sum(math.exp(z - peak) for z in logits))


def log_softmax(logits):
    peak = max(logits)
    return [z - peak - math.log(sum(math.exp(w - peak) for w in logits)) for z in logits]


def relative_entropy(logits, other):
    log_p, log_q = log_softmax(logits), log_softmax(other)
    return sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))


def per_token(function):
    """Turns a function of one token's numbers into one of [B, T] arrays, or of [B] arrays."""

    def loop(*arrays, **hyper):
        out = np.zeros(arrays[0].shape)
        for index in np.ndindex(*out.shape):
            out[index] = function(*(array[index] for array in arrays), **hyper)
        return out

    return loop


def per_position(function):
    """Turns a function of one position's logits into one of [B, T, V] arrays."""

    def loop(*arrays, **hyper):
        out = np.zeros(arrays[0].shape[:2])
        for index in np.ndindex(*out.shape):
            out[index] = function(*(array[index].tolist() for array in arrays), **hyper)
        return out

    return loop


def per_row(function):
    def loop(*arrays, **hyper):
        return np.array([function(*row, **hyper) for row in zip(*arrays, strict=True)])

    return loop


def token_log_prob(logits, target, temperature):
    return log_softmax([z / temperature for z in logits])[target]


def token_entropy(logits, temperature):
    return -sum(math.exp(a) * a for a in log_softmax([z / temperature for z in logits]))


def chunked(hidden, unembedding, targets, chunk_size, temperature):
    logits = np.zeros((*hidden.shape[:2], len(unembedding)))
    for b, t, v in np.ndindex(*logits.shape):
        logits[b, t, v] = sum(hidden[b, t, d] * unembedding[v, d] for d in range(hidden.shape[2]))
    return (
        per_position(token_log_prob)(logits, targets, temperature=temperature),
        per_position(token_entropy)(logits, temperature=temperature),
    )


def bradley_terry(chosen, rejected, margin, label_smoothing, centering):
    gap = chosen - rejected - margin
    likelihood = (1 - label_smoothing) * minus_log_sigmoid(gap) + label_smoothing * minus_log_sigmoid(-gap)
    return likelihood + centering * (chosen + rejected) ** 2


def pairwise_ranking(rewards, ranks, mask):
    total, pairs = 0.0, 0
    for i in range(len(rewards)):
        for j in range(len(rewards)):
            if mask[i] and mask[j] and ranks[i] < ranks[j]:
                total, pairs = total + minus_log_sigmoid(rewards[i] - rewards[j]), pairs + 1
    return total / pairs if pairs else 0.0


def plackett_luce(rewards, ranks, mask):
    present = [i for i in range(len(rewards)) if mask[i]]
    return sum(
        log_normaliser([rewards[j] for j in present if ranks[j] >= ranks[i]]) - rewards[i] for i in present
    )


def length_moments(rewards, lengths, mask):
    present = [i for i in range(len(rewards)) if mask[i]]
    if not present:
        return 0.0, 0.0, 0.0
    reward, length = (sum(of[i] for i in present) / len(present) for of in (rewards, lengths))
    return (
        sum((rewards[i] - reward) ** 2 for i in present),
        sum((rewards[i] - reward) * (lengths[i] - length) for i in present),
        sum((lengths[i] - length) ** 2 for i in present),
    )


def length_penalty(rewards, lengths, mask, reward_variance, covariance, length_variance):
    variance, shared, _ = length_moments(rewards, lengths, mask)
    if reward_variance <= 0 or length_variance <= 0:
        return 0.0
    scale = reward_variance * length_variance
    return 2 * covariance * shared / scale - covariance**2 * variance / (reward_variance * scale)


def of_delta(function):
    return per_token(lambda w, l, rw, rl, **hyper: function((w - rw) - (l - rl), **hyper))  # noqa: E741


def smoothed(delta, beta, label_smoothing):
    kept = (1 - label_smoothing) * minus_log_sigmoid(beta * delta)
    return kept + label_smoothing * minus_log_sigmoid(-beta * delta)


def robust(delta, beta, label_smoothing):
    kept = (1 - label_smoothing) * minus_log_sigmoid(beta * delta)
    return (kept - label_smoothing * minus_log_sigmoid(-beta * delta)) / (1 - 2 * label_smoothing)


def orpo(chosen, rejected, weight):
    def log_odds(log_p):
        log_p = min(log_p, -1e-6)
        return log_p - math.log(-math.expm1(log_p))

    return weight * minus_log_sigmoid(log_odds(chosen) - log_odds(rejected))


def kto(policy, ref, desirable, baseline, beta, desirable_weight, undesirable_weight):
    gain = policy - ref - max(baseline, 0.0)
    if desirable:
        return desirable_weight * (1.0 - sigmoid(beta * gain))
    return undesirable_weight * (1.0 - sigmoid(-beta * gain))


def k3(new, ref):
    log_ratio = min(ref - new, 20.0)
    return (
        math.exp(log_ratio) - 1.0 - log_ratio
        if abs(log_ratio) > 1e-3
        else log_ratio**2 / 2 + log_ratio**3 / 6
    )


def penalized_rewards(scores, kl, mask, beta):
    out = np.zeros(kl.shape)
    for b in range(len(kl)):
        tokens = [t for t in range(kl.shape[1]) if mask[b, t]]
        for t in tokens:
            out[b, t] = -beta * kl[b, t] + (scores[b] if t == tokens[-1] else 0.0)
    return out


def gae(rewards, values, mask, gamma, lam):
    """The definition, a double sum over the tokens that are there; no recursion."""
    advantages = np.zeros(rewards.shape)
    for b in range(len(rewards)):
        tokens = [t for t in range(rewards.shape[1]) if mask[b, t]]
        following = {t: values[b, after] for t, after in zip(tokens, tokens[1:], strict=False)}
        errors = [rewards[b, t] + gamma * following.get(t, 0.0) - values[b, t] for t in tokens]
        for i, t in enumerate(tokens):
            advantages[b, t] = sum((gamma * lam) ** l * error for l, error in enumerate(errors[i:]))  # noqa: E741
    return advantages, np.where(mask, advantages + values, 0.0)


def group_relative(rewards):
    mean = sum(rewards) / len(rewards)
    deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - mean) / (deviation + 1e-4) for r in rewards]


def leave_one_out(rewards):
    return [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards]


def surrogate(ratio, advantage, clip_low, clip_high):
    clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
    return -min(ratio * advantage, clipped * advantage)


def clipped_surrogate(new, old, advantage, **clips):
    return surrogate(math.exp(max(-20.0, min(20.0, new - old))), advantage, **clips)


def sequence_clipped_surrogate(new, old, advantage, mask, **clips):
    ratios = [n - o for n, o, here in zip(new, old, mask, strict=True) if here]
    if not ratios:
        return 0.0
    return surrogate(math.exp(max(-20.0, min(20.0, sum(ratios) / len(ratios)))), advantage, **clips)


def exponentially_weighted(log_prob, weight, temperature, max_weight):
    exponent = weight / temperature
    return -(max_weight if exponent > math.log(max_weight) else math.exp(exponent)) * log_prob


def clipped_value(value, old, target, clip):
    return 0.5 * max((value - target) ** 2, (old + min(max(value - old, -clip), clip) - target) ** 2)


def process_reward(logit, label, here):
    return label * minus_log_sigmoid(logit) + (1 - label) * minus_log_sigmoid(-logit) if here else 0.0


ORACLES = {
    "token_log_probs": per_position(token_log_prob),
    "token_entropy": per_position(token_entropy),
    "chunked_token_log_probs": chunked,
    "sequence_log_probs": per_row(lambda x, mask: sum(a for a, here in zip(x, mask, strict=True) if here)),
    "sequence_mean_log_probs": per_row(
        lambda x, mask: sum(a for a, here in zip(x, mask, strict=True) if here) / max(sum(mask), 1)
    ),
    "bradley_terry_loss": per_token(bradley_terry),
    "pairwise_ranking_loss": per_row(pairwise_ranking),
    "plackett_luce_loss": per_row(plackett_luce),
    "length_moments": per_row(length_moments),
    "length_penalty_loss": per_row(length_penalty),
    "implicit_rewards": per_token(lambda policy, ref, beta: beta * (policy - ref)),
    "dpo_loss": of_delta(smoothed),
    "ipo_loss": of_delta(lambda delta, beta: (delta - 0.5 / beta) ** 2),
    "robust_dpo_loss": of_delta(robust),
    "hinge_loss": of_delta(lambda delta, beta: max(0.0, 1.0 - beta * delta)),
    "simpo_loss": per_token(lambda w, l, beta, margin: minus_log_sigmoid(beta * (w - l) - margin)),  # noqa: E741
    "orpo_loss": per_token(orpo),
    "kto_loss": per_token(kto),
    "kl_k1": per_token(lambda new, ref: new - ref),
    "kl_k2": per_token(lambda new, ref: (new - ref) ** 2 / 2),
    "kl_k3": per_token(k3),
    "full_kl": per_position(relative_entropy),
    "full_forward_kl": per_position(lambda logits, ref: relative_entropy(ref, logits)),
    "kl_penalized_rewards": penalized_rewards,
    "generalized_advantage_estimation": gae,
    "group_relative_advantages": per_row(group_relative),
    "leave_one_out_advantages": per_row(leave_one_out),
    "reinforce_loss": per_token(lambda log_prob, advantage: -advantage * log_prob),
    "clipped_surrogate_loss": per_token(clipped_surrogate),
    "sequence_clipped_surrogate_loss": per_row(sequence_clipped_surrogate),
    "advantage_weighted_loss": per_token(exponentially_weighted),
    "reward_weighted_loss": per_token(exponentially_weighted),
    "distribution_matching_loss": per_token(
        lambda new, old, target, max_weight: exponentially_weighted(new, target - old, 1.0, max_weight)
    ),
    "value_loss": per_token(lambda value, target: 0.5 * (value - target) ** 2),
    "clipped_value_loss": per_token(clipped_value),
    "process_reward_loss": per_token(process_reward),
}


def test_every_loss_has_an_oracle_and_a_case(cases):
    elsewhere = {"adaptive_beta"}  # three scalars: test_kl.py
    assert set(ORACLES) == set(cases) == set(losses.__all__) - elsewhere


def expected_of(case, arrays):
    wide = [a.astype(np.float64) if a.dtype == np.float32 else a for a in arrays]
    return jax.tree.leaves(ORACLES[case.name](*wide, **case.hyper))


def test_float32_matches_the_oracle(case):
    for ours, expected in zip(
        jax.tree.leaves(case.function(*case.arrays)), expected_of(case, case.arrays), strict=True
    ):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-6)


def test_float64_matches_the_oracle(case):
    with jax.enable_x64(True):
        wide = [a.astype(np.float64) if a.dtype == np.float32 else a for a in case.arrays]
        ours = jax.tree.leaves(case.function(*wide))
    for value, expected in zip(ours, expected_of(case, case.arrays), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_extremes_match_the_oracle_and_have_finite_gradients(case, scale):
    """Logits, log-probabilities and rewards of ten thousand: exact values, finite slopes."""
    kept = {"chunked_token_log_probs": (1,), "process_reward_loss": (1,)}.get(case.name, ())
    arrays = [
        a * np.float32(scale) if a.dtype == np.float32 and i not in kept else a
        for i, a in enumerate(case.arrays)
    ]
    expected = expected_of(case, arrays)
    for ours, exact in zip(jax.tree.leaves(case.function(*arrays)), expected, strict=True):
        # Differences of numbers of this size keep this much of them; squares, of their square.
        size = max(scale, float(np.max(np.abs(exact))))
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=size * 2e-6)

    def total(*differentiated):
        inputs = list(arrays)
        for i, x in zip(case.differentiable, differentiated, strict=True):
            inputs[i] = x
        return sum(leaf.sum() for leaf in jax.tree.leaves(case.function(*inputs)))

    if case.differentiable:
        arguments = tuple(range(len(case.differentiable)))
        gradients = jax.grad(total, arguments)(*(arrays[i] for i in case.differentiable))
        for i, gradient in zip(case.differentiable, gradients, strict=True):
            assert np.isfinite(gradient).all(), f"argument {i}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_computed_in_float32(case, dtype):
    """The answer is that of float32 arithmetic on the rounded input, not that of half-precision arithmetic."""
    half = [jax.numpy.asarray(a, dtype) if a.dtype == np.float32 else a for a in case.arrays]
    rounded = [np.asarray(a, np.float32) if a.dtype == dtype else a for a in half]
    for ours, expected in zip(jax.tree.leaves(case.function(*half)), expected_of(case, rounded), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-6)
