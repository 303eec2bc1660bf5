"""Learning from comparisons: reward models and direct preference optimisation; imports jax, masking and
checks only.

The direct losses compare implicit rewards. Their four inputs are log-probabilities of whole responses, summed
over tokens (`sequence_log_probs`) unless a docstring says mean; Delta below is (policy_chosen - ref_chosen) -
(policy_rejected - ref_rejected). The reference is held constant everywhere.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.losses import checks
from rlhf_jax.masking import elementwise

__all__ = [
    "bradley_terry_loss",
    "dpo_loss",
    "hinge_loss",
    "implicit_rewards",
    "ipo_loss",
    "kto_loss",
    "orpo_loss",
    "pairwise_ranking_loss",
    "plackett_luce_loss",
    "robust_dpo_loss",
    "simpo_loss",
]

CERTAINTY_GAP = 1e-6
"""ORPO's odds p / (1 - p) are cut where log p is this close to 0: a certain response has finite odds."""


def bradley_terry_loss(
    chosen_rewards: jax.typing.ArrayLike,
    rejected_rewards: jax.typing.ArrayLike,
    *,
    margin: float | jax.Array = 0.0,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
) -> jax.Array:
    """Negative log-likelihood that the chosen response wins, under Bradley-Terry.

    -(1 - eps) log sigmoid(d) - eps log sigmoid(-d) + c (r_w + r_l)^2, d = r_w - r_l - margin: Rafailov et al.
    (2023), eq. 2; the margin is Touvron et al. (2023)'s eq. 2, the centering Eisenstein et al. (2023)'s. Only
    differences of rewards matter to the first two terms, so a model is recovered up to one constant, which
    centering pins.

    Args:
      chosen_rewards: [B] float, r_w.
      rejected_rewards: [B] float, r_l, of the other response to the same prompt.
      margin: a number or [B] float, how much better the chosen one should be; held constant.
      label_smoothing: eps in [0, 0.5), the share of labels taken to be flipped.
      centering: c, at least 0, the pull of the pair's rewards towards mean 0 (0.01 is usual).

    Returns:
      [B] float32, nats a pair.

    Raises:
      TypeError: rewards are not floating.
      ValueError: wrong rank, shapes that differ, or a number outside its range.

    >>> bradley_terry_loss(jnp.array([1.0]), jnp.array([0.0]))
    Array([0.3132...], dtype=float32)
    """
    chosen = checks.floating("chosen_rewards", chosen_rewards, "B")
    rejected = checks.floating("rejected_rewards", rejected_rewards, like=("chosen_rewards", chosen))
    checks.smoothing("label_smoothing", label_smoothing)
    checks.non_negative("centering", centering)
    margins = checks.number_or_rows("margin", margin, ("chosen_rewards", chosen))

    def loss(chosen: jax.Array, rejected: jax.Array, margin: jax.Array) -> jax.Array:
        return _smoothed(chosen - rejected - margin, label_smoothing) + centering * jnp.square(
            chosen + rejected
        )

    return elementwise(loss, chosen, rejected, jax.lax.stop_gradient(margins))


def pairwise_ranking_loss(
    rewards: jax.typing.ArrayLike, ranks: jax.typing.ArrayLike, mask: jax.typing.ArrayLike
) -> jax.Array:
    """Bradley-Terry over every ordered pair of a prompt's ranked responses, averaged per prompt.

    -(1 / pairs) sum_{i ranked before j} log sigmoid(r_i - r_j): Ouyang et al. (2022), eq. 1. Averaging within
    the prompt keeps one with K responses from weighing K (K - 1) / 2 times as much as one with two.

    Args:
      rewards: [N, K] float, one reward a response.
      ranks: [N, K] int or float, smaller is better; responses of equal rank make no pair. Held constant.
      mask: [N, K] bool, True where there is a response.

    Returns:
      [N] float32, nats a pair; 0 for a prompt without a pair.

    Raises:
      TypeError: ``rewards`` is not floating or ``mask`` not boolean.
      ValueError: wrong rank, or shapes that differ.

    >>> ranks, mask = jnp.array([[1, 2, 2]]), jnp.ones((1, 3), bool)
    >>> pairwise_ranking_loss(jnp.array([[1.0, 0.0, 0.0]]), ranks, mask)
    Array([0.3132...], dtype=float32)
    """
    rewards, ranks, mask = _checked_ranking(rewards, ranks, mask)
    is_pair = mask[:, :, None] & mask[:, None, :] & (ranks[:, :, None] < ranks[:, None, :])
    losses = jax.nn.softplus(rewards[:, None, :] - rewards[:, :, None])
    pairs = jnp.sum(is_pair, axis=(1, 2)).astype(rewards.dtype)
    return jnp.sum(jnp.where(is_pair, losses, 0.0), axis=(1, 2)) / jnp.maximum(pairs, 1.0)


def plackett_luce_loss(
    rewards: jax.typing.ArrayLike, ranks: jax.typing.ArrayLike, mask: jax.typing.ArrayLike
) -> jax.Array:
    """Negative log-likelihood of a whole ranking: the best is drawn by softmax, then the best of the rest,
    and so on.

    -sum_k (r_(k) - log sum_{j >= k} exp r_(j)), r_(k) the reward of the response ranked k-th: Luce (1959),
    Plackett (1975); Rafailov et al. (2023), appendix A.3. Two responses make it `bradley_terry_loss`. Responses of
    equal rank all compete in each other's sums (Breslow's rule).

    Args:
      rewards: [N, K] float, one reward a response.
      ranks: [N, K] int or float, smaller is better. Held constant.
      mask: [N, K] bool, True where there is a response.

    Returns:
      [N] float32, nats a ranking; 0 for a prompt with fewer than two responses.

    Raises:
      TypeError: ``rewards`` is not floating or ``mask`` not boolean.
      ValueError: wrong rank, or shapes that differ.

    >>> ranks, mask = jnp.array([[1, 3, 2]]), jnp.ones((1, 3), bool)
    >>> plackett_luce_loss(jnp.array([[0.0, 0.0, 0.0]]), ranks, mask)  # log 3!
    Array([1.791...], dtype=float32)
    """
    rewards, ranks, mask = _checked_ranking(rewards, ranks, mask)
    competes = mask[:, None, :] & (ranks[:, None, :] >= ranks[:, :, None])
    competes |= jnp.eye(rewards.shape[1], dtype=bool)[None]  # a masked row keeps itself: log 1 = 0, no log 0
    remaining = jnp.broadcast_to(rewards[:, None, :], competes.shape)
    terms = jax.nn.logsumexp(jnp.where(competes, remaining, -jnp.inf), axis=2) - rewards
    return jnp.sum(jnp.where(mask, terms, 0.0), axis=1)


def implicit_rewards(
    policy: jax.typing.ArrayLike, ref: jax.typing.ArrayLike, *, beta: float | jax.Array
) -> jax.Array:
    """The reward whose optimum the policy already is, up to a constant of the prompt.

    beta (log pi(y|x) - log pi_ref(y|x)): Rafailov et al. (2023), eq. 5 without its partition function.

    Args:
      policy: [B] float, summed log-probabilities, nats ([B, T] gives token-level credit).
      ref: the same shape, under the reference; held constant.
      beta: above 0.

    Returns:
      The same shape, float32.

    Raises:
      TypeError: an argument is not floating.
      ValueError: wrong rank, shapes that differ, or ``beta`` not above 0.

    >>> implicit_rewards(jnp.array([-10.0]), jnp.array([-12.0]), beta=0.5)
    Array([1.], dtype=float32)
    """
    policy = checks.floating("policy", policy, "B", "B T")
    ref = jax.lax.stop_gradient(checks.floating("ref", ref, like=("policy", policy)))
    checks.positive("beta", beta)
    return elementwise(lambda policy, ref: beta * (policy - ref), policy, ref)


def dpo_loss(
    policy_chosen: jax.typing.ArrayLike,
    policy_rejected: jax.typing.ArrayLike,
    ref_chosen: jax.typing.ArrayLike,
    ref_rejected: jax.typing.ArrayLike,
    *,
    beta: float | jax.Array,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Bradley-Terry on implicit rewards: preferences train the policy with no reward model in between.

    -(1 - eps) log sigmoid(beta Delta) - eps log sigmoid(-beta Delta): Rafailov et al. (2023), eq. 7; eps > 0
    is the conservative DPO of Mitchell (2023), eq. 3.

    Args:
      policy_chosen: [B] float, log pi(y_w | x), nats, summed over response tokens.
      policy_rejected: [B] float, log pi(y_l | x).
      ref_chosen: [B] float, log pi_ref(y_w | x); held constant.
      ref_rejected: [B] float, log pi_ref(y_l | x); held constant.
      beta: the leash, above 0 (0.1 in the paper, 0.5 for summaries).
      label_smoothing: eps in [0, 0.5), the share of labels taken to be flipped.

    Returns:
      [B] float32, nats a pair.

    Raises:
      TypeError: log-probabilities are not floating.
      ValueError: wrong rank, shapes that differ, or a number outside its range.

    >>> one, zero = jnp.array([1.0]), jnp.array([0.0])
    >>> dpo_loss(one, zero, zero, zero, beta=1.0, label_smoothing=0.1)
    Array([0.4132...], dtype=float32)
    """
    checks.smoothing("label_smoothing", label_smoothing)
    return _of_delta(
        lambda delta: _smoothed(beta * delta, label_smoothing),
        policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta,
    )  # fmt: skip


def ipo_loss(
    policy_chosen: jax.typing.ArrayLike,
    policy_rejected: jax.typing.ArrayLike,
    ref_chosen: jax.typing.ArrayLike,
    ref_rejected: jax.typing.ArrayLike,
    *,
    beta: float | jax.Array,
) -> jax.Array:
    """Regresses the log-ratio gap onto a constant, so that certain preferences cannot push it to infinity.

    (Delta - 1 / (2 beta))^2: Azar et al. (2023), eq. 17. The caller chooses sums over tokens (the paper,
    OpenRLHF) or means (TRL).

    Args:
      policy_chosen: [B] float, nats, of the chosen response.
      policy_rejected: [B] float, of the rejected one.
      ref_chosen: [B] float; held constant.
      ref_rejected: [B] float; held constant.
      beta: the paper's tau, above 0.

    Returns:
      [B] float32, nats squared.

    Raises:
      TypeError: log-probabilities are not floating.
      ValueError: wrong rank, shapes that differ, or ``beta`` not above 0.

    >>> ipo_loss(jnp.array([2.0]), jnp.array([-1.0]), jnp.zeros(1), jnp.zeros(1), beta=0.1)
    Array([4.], dtype=float32)
    """
    return _of_delta(
        lambda delta: jnp.square(delta - 1.0 / (2.0 * beta)),
        policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta,
    )  # fmt: skip


def robust_dpo_loss(
    policy_chosen: jax.typing.ArrayLike,
    policy_rejected: jax.typing.ArrayLike,
    ref_chosen: jax.typing.ArrayLike,
    ref_rejected: jax.typing.ArrayLike,
    *,
    beta: float | jax.Array,
    label_smoothing: float,
) -> jax.Array:
    """DPO debiased for flipped labels: its mean over noisy labels is the DPO loss on the clean ones.

    (-(1 - eps) log sigmoid(beta Delta) + eps log sigmoid(-beta Delta)) / (1 - 2 eps): Chowdhury, Kini &
    Natarajan (2024), the loss of rDPO.

    Args:
      policy_chosen: [B] float, log pi(y_w | x), nats, summed over response tokens.
      policy_rejected: [B] float, log pi(y_l | x).
      ref_chosen: [B] float; held constant.
      ref_rejected: [B] float; held constant.
      beta: the leash, above 0.
      label_smoothing: eps in [0, 0.5), the known share of flipped labels.

    Returns:
      [B] float32, nats a pair; may be negative.

    Raises:
      TypeError: log-probabilities are not floating.
      ValueError: wrong rank, shapes that differ, or a number outside its range.

    >>> one, zero = jnp.array([1.0]), jnp.array([0.0])
    >>> robust_dpo_loss(one, zero, zero, zero, beta=1.0, label_smoothing=0.1)
    Array([0.1882...], dtype=float32)
    """
    checks.smoothing("label_smoothing", label_smoothing)

    def loss(delta: jax.Array) -> jax.Array:
        won, lost = jax.nn.softplus(-beta * delta), jax.nn.softplus(beta * delta)
        return ((1.0 - label_smoothing) * won - label_smoothing * lost) / (1.0 - 2.0 * label_smoothing)

    return _of_delta(loss, policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)


def hinge_loss(
    policy_chosen: jax.typing.ArrayLike,
    policy_rejected: jax.typing.ArrayLike,
    ref_chosen: jax.typing.ArrayLike,
    ref_rejected: jax.typing.ArrayLike,
    *,
    beta: float | jax.Array,
) -> jax.Array:
    """A margin on the log-ratio gap: pairs apart by 1 / beta cost nothing.

    max(0, 1 - beta Delta): the calibration loss of SLiC-HF (Zhao et al. 2023, eq. 1) on log-ratios, as Liu et
    al. (2024) normalise it.

    Args:
      policy_chosen: [B] float, log pi(y_w | x), nats, summed over response tokens.
      policy_rejected: [B] float, log pi(y_l | x).
      ref_chosen: [B] float; held constant.
      ref_rejected: [B] float; held constant.
      beta: one over the margin in nats, above 0.

    Returns:
      [B] float32, at least 0.

    Raises:
      TypeError: log-probabilities are not floating.
      ValueError: wrong rank, shapes that differ, or ``beta`` not above 0.

    >>> hinge_loss(jnp.array([2.0]), jnp.array([-1.0]), jnp.zeros(1), jnp.zeros(1), beta=0.1)
    Array([0.7...], dtype=float32)
    """
    return _of_delta(
        lambda delta: jax.nn.relu(1.0 - beta * delta),
        policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta,
    )  # fmt: skip


def simpo_loss(
    policy_chosen_mean: jax.typing.ArrayLike,
    policy_rejected_mean: jax.typing.ArrayLike,
    *,
    beta: float | jax.Array,
    margin: float | jax.Array,
) -> jax.Array:
    """Preferences on length-normalised log-probabilities, with a target margin and no reference.

    -log sigmoid(beta (mean log pi(y_w) - mean log pi(y_l)) - margin): Meng et al. (2024), eq. 6; margin is
    their gamma.

    Args:
      policy_chosen_mean: [B] float, nats a token (`sequence_mean_log_probs`).
      policy_rejected_mean: [B] float, nats a token.
      beta: above 0 (2.0 to 2.5 in the paper).
      margin: gamma, in units of reward (0.5 to 1.6 in the paper).

    Returns:
      [B] float32, nats a pair.

    Raises:
      TypeError: log-probabilities are not floating.
      ValueError: wrong rank, shapes that differ, or ``beta`` not above 0.

    >>> simpo_loss(jnp.array([-1.0]), jnp.array([-2.0]), beta=2.0, margin=1.0)
    Array([0.3132...], dtype=float32)
    """
    checks.positive("beta", beta)
    chosen, rejected = _checked_means(policy_chosen_mean, policy_rejected_mean)
    return elementwise(
        lambda chosen, rejected: jax.nn.softplus(margin - beta * (chosen - rejected)), chosen, rejected
    )


def orpo_loss(
    policy_chosen_mean: jax.typing.ArrayLike,
    policy_rejected_mean: jax.typing.ArrayLike,
    *,
    weight: float | jax.Array,
) -> jax.Array:
    """The odds-ratio term of ORPO, to be added to the supervised loss on the chosen response.

    -weight log sigmoid(log(odds(y_w) / odds(y_l))), odds = p / (1 - p), p = exp(mean log pi): Hong et al.
    (2024), eq. 7 times eq. 6's lambda. log p is cut at -1e-6, where the odds are a million.

    Args:
      policy_chosen_mean: [B] float, nats a token, at most 0.
      policy_rejected_mean: [B] float, nats a token, at most 0.
      weight: lambda, above 0 (0.1 in the paper).

    Returns:
      [B] float32.

    Raises:
      TypeError: log-probabilities are not floating.
      ValueError: wrong rank, shapes that differ, or ``weight`` not above 0.

    >>> even = jnp.log(jnp.array([0.5]))
    >>> orpo_loss(jnp.log(jnp.array([0.8])), even, weight=1.0)  # odds 4 to 1: log(1 + 1/4)
    Array([0.223...], dtype=float32)
    """
    checks.positive("weight", weight)
    chosen, rejected = _checked_means(policy_chosen_mean, policy_rejected_mean)

    def log_odds(log_p: jax.Array) -> jax.Array:
        log_p = jnp.minimum(log_p, -CERTAINTY_GAP)
        return log_p - jnp.log(-jnp.expm1(log_p))

    return elementwise(lambda c, r: weight * jax.nn.softplus(log_odds(r) - log_odds(c)), chosen, rejected)


def kto_loss(
    policy: jax.typing.ArrayLike,
    ref: jax.typing.ArrayLike,
    desirable: jax.typing.ArrayLike,
    kl_baseline: jax.typing.ArrayLike,
    *,
    beta: float | jax.Array,
    desirable_weight: float | jax.Array = 1.0,
    undesirable_weight: float | jax.Array = 1.0,
) -> jax.Array:
    """Prospect theory on single responses, each labelled good or bad, with no pairs.

    w_D (1 - sigmoid(beta (c - z))) for a desirable response, w_U (1 - sigmoid(beta (z - c))) for another,
    with c = log pi(y|x) - log pi_ref(y|x) and z = max(kl_baseline, 0): the KTO loss of Ethayarajh et al.
    (2024).

    Args:
      policy: [B] float, log pi(y | x), nats, summed over response tokens.
      ref: [B] float, log pi_ref(y | x); held constant.
      desirable: [B] bool, True for a good response.
      kl_baseline: [] or [B] float, nats: the mean log-ratio over mismatched prompts and responses; held
        constant.
      beta: above 0 (0.1 in the paper).
      desirable_weight: w_D, at least 0.
      undesirable_weight: w_U, at least 0.

    Returns:
      [B] float32, between 0 and the weight.

    Raises:
      TypeError: log-probabilities are not floating or ``desirable`` is not boolean.
      ValueError: wrong rank, shapes that differ, or a number outside its range.

    >>> kto_loss(jnp.zeros(2), jnp.zeros(2), jnp.array([True, False]), jnp.array(1.0), beta=1.0)
    Array([0.731..., 0.268...], dtype=float32)
    """
    policy = checks.floating("policy", policy, "B")
    ref = jax.lax.stop_gradient(checks.floating("ref", ref, like=("policy", policy)))
    desirable = checks.boolean("desirable", desirable, ("policy", policy))
    baseline = checks.number_or_rows("kl_baseline", kl_baseline, ("policy", policy))
    checks.positive("beta", beta)
    checks.non_negative("desirable_weight", desirable_weight)
    checks.non_negative("undesirable_weight", undesirable_weight)

    def loss(policy: jax.Array, ref: jax.Array, baseline: jax.Array) -> jax.Array:
        gain = beta * (policy - ref - jnp.maximum(baseline, 0.0))
        good, bad = desirable_weight * jax.nn.sigmoid(-gain), undesirable_weight * jax.nn.sigmoid(gain)
        return jnp.where(desirable, good, bad)

    return elementwise(loss, policy, ref, jax.lax.stop_gradient(baseline))


def _smoothed(logit: jax.Array, label_smoothing: float) -> jax.Array:
    return (1.0 - label_smoothing) * jax.nn.softplus(-logit) + label_smoothing * jax.nn.softplus(logit)


def _of_delta(loss, policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta) -> jax.Array:
    """A loss of Delta, after checking the five arguments that the direct losses share."""
    chosen = checks.floating("policy_chosen", policy_chosen, "B")
    like = ("policy_chosen", chosen)
    rejected = checks.floating("policy_rejected", policy_rejected, like=like)
    ref_chosen = checks.floating("ref_chosen", ref_chosen, like=like)
    ref_rejected = checks.floating("ref_rejected", ref_rejected, like=like)
    checks.positive("beta", beta)
    references = jax.lax.stop_gradient((ref_chosen, ref_rejected))
    return elementwise(lambda w, l, rw, rl: loss((w - rw) - (l - rl)), chosen, rejected, *references)  # noqa: E741


def _checked_means(
    chosen: jax.typing.ArrayLike, rejected: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    chosen = checks.floating("policy_chosen_mean", chosen, "B")
    return chosen, checks.floating("policy_rejected_mean", rejected, like=("policy_chosen_mean", chosen))


def _checked_ranking(rewards, ranks, mask) -> tuple[jax.Array, jax.Array, jax.Array]:
    rewards = checks.floating("rewards", rewards, "N K")
    mask = checks.boolean("mask", mask, ("rewards", rewards))
    ranks = jnp.asarray(ranks)
    if ranks.shape != rewards.shape:
        raise ValueError(
            f"ranks must have the shape of rewards, {list(rewards.shape)}, got {list(ranks.shape)}"
        )
    return jnp.where(mask, rewards, 0.0), jax.lax.stop_gradient(ranks), mask
