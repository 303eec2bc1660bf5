"""Direct preference optimisation, comparisons straight into a policy; imports jax, masking, checks and
reward_modelling only.

The losses compare implicit rewards. Their four inputs are log-probabilities of whole responses, summed
over tokens (`sequence_log_probs`) unless a docstring says mean; Delta below is (policy_chosen - ref_chosen) -
(policy_rejected - ref_rejected). The reference is held constant everywhere.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.losses import checks
from rlhf_jax.losses.reward_modelling import noisy_cross_entropy
from rlhf_jax.masking import elementwise

__all__ = [
    "dpo_loss",
    "hinge_loss",
    "implicit_rewards",
    "ipo_loss",
    "kto_loss",
    "orpo_loss",
    "robust_dpo_loss",
    "simpo_loss",
]

CERTAINTY_GAP = 1e-6
"""ORPO's odds p / (1 - p) are cut where log p is this close to 0: a certain response has finite odds."""


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
        lambda delta: noisy_cross_entropy(beta * delta, label_smoothing),
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

    max(0, 1 - beta Delta): the rank calibration loss of SLiC-HF (Zhao et al. 2023) on log-ratios, the hinge-norm
    loss of RSO (Liu et al. 2024).

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
    margin: jax.typing.ArrayLike,
) -> jax.Array:
    """Preferences on length-normalised log-probabilities, with a target margin and no reference.

    -log sigmoid(beta (mean log pi(y_w) - mean log pi(y_l)) - margin): Meng et al. (2024), eq. 6; margin is
    their gamma.

    Args:
      policy_chosen_mean: [B] float, nats a token (`sequence_mean_log_probs`).
      policy_rejected_mean: [B] float, nats a token.
      beta: above 0 (2.0 to 2.5 in the paper).
      margin: gamma, a number or [B] float, in units of reward (0.5 to 1.5 in the paper); held constant.

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
    margins = checks.number_or_rows("margin", margin, ("policy_chosen_mean", chosen))
    return elementwise(
        lambda chosen, rejected, margin: jax.nn.softplus(margin - beta * (chosen - rejected)),
        chosen,
        rejected,
        jax.lax.stop_gradient(margins),
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
      weight: lambda, above 0 (0.1 to 0.25 in the paper).

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
