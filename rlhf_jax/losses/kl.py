"""How far a policy has moved from its reference, and the leash made of it; imports jax, masking and checks
only.

The estimators k1, k2, k3 (Schulman 2020, "Approximating KL Divergence") average, over tokens sampled from the
policy, to the reverse KL(pi || pi_ref) in value (k1, k3) or in gradient (k2). With d = log pi - log pi_ref at
the sampled token: k1 = d, k2 = d^2 / 2, k3 = e^-d - 1 + d.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.losses import checks
from rlhf_jax.masking import elementwise

__all__ = [
    "LOG_RATIO_BOUND",
    "adaptive_beta",
    "full_forward_kl",
    "full_kl",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_penalized_rewards",
]

LOG_RATIO_BOUND = 20.0
"""Log-ratios are cut here before exp: e^20 = 4.9e8 leaves room for its products in float32."""

ADAPTIVE_BETA_STEP = 0.2
"""Ziegler et al. (2019) clip the relative error of the KL here before it moves beta."""


def kl_k1(log_probs: jax.typing.ArrayLike, ref_log_probs: jax.typing.ArrayLike) -> jax.Array:
    """The plain log-ratio: unbiased for KL(pi || pi_ref) in value, of high variance, and negative half the
    time.

    k1 = log pi - log pi_ref (Schulman 2020). Its gradient averages to 0, not to the KL's: subtract it from
    rewards, do not differentiate it.

    Args:
      log_probs: [B, T] or [B] float, nats, of tokens sampled from pi.
      ref_log_probs: the same shape, under the reference; held constant.

    Returns:
      The same shape, float32, nats.

    Raises:
      TypeError: an argument is not floating.
      ValueError: wrong rank, or shapes that differ.

    >>> kl_k1(jnp.array([-1.0, -1.0]), jnp.array([-2.0, -0.5]))
    Array([ 1. , -0.5], dtype=float32)
    """
    return elementwise(jnp.subtract, *_checked_pair(log_probs, ref_log_probs))


def kl_k2(log_probs: jax.typing.ArrayLike, ref_log_probs: jax.typing.ArrayLike) -> jax.Array:
    """Half the squared log-ratio: biased in value, but its gradient averages to the gradient of KL(pi ||
    pi_ref).

    k2 = (log pi - log pi_ref)^2 / 2 (Schulman 2020). The estimator to differentiate on on-policy samples.

    Args:
      log_probs: [B, T] or [B] float, nats, of tokens sampled from pi.
      ref_log_probs: the same shape, under the reference; held constant.

    Returns:
      The same shape, float32, at least 0.

    Raises:
      TypeError: an argument is not floating.
      ValueError: wrong rank, or shapes that differ.

    >>> kl_k2(jnp.array([-1.0, -1.0]), jnp.array([-2.0, -0.5]))
    Array([0.5  , 0.125], dtype=float32)
    """
    return elementwise(lambda new, ref: 0.5 * jnp.square(new - ref), *_checked_pair(log_probs, ref_log_probs))


def kl_k3(log_probs: jax.typing.ArrayLike, ref_log_probs: jax.typing.ArrayLike) -> jax.Array:
    """The log-ratio with a control variate: unbiased for KL(pi || pi_ref) in value, and never negative.

    k3 = pi_ref / pi - 1 - log(pi_ref / pi) (Schulman 2020; Shao et al. 2024, eq. 4). Its gradient averages to
    that of the *forward* KL(pi_ref || pi). log(pi_ref / pi) is cut at +20, where value and gradient stay
    finite and the gradient is 0.

    Args:
      log_probs: [B, T] or [B] float, nats, of tokens sampled from pi.
      ref_log_probs: the same shape, under the reference; held constant.

    Returns:
      The same shape, float32, at least 0.

    Raises:
      TypeError: an argument is not floating.
      ValueError: wrong rank, or shapes that differ.

    >>> kl_k3(jnp.array([-1.0, -1.0]), jnp.array([0.0, -30.0]))
    Array([ 0.718...,  28. ...], dtype=float32)
    """

    def k3(new: jax.Array, ref: jax.Array) -> jax.Array:
        log_ratio = jnp.minimum(ref - new, LOG_RATIO_BOUND)
        return jnp.expm1(log_ratio) - log_ratio

    return elementwise(k3, *_checked_pair(log_probs, ref_log_probs))


def full_kl(logits: jax.typing.ArrayLike, ref_logits: jax.typing.ArrayLike) -> jax.Array:
    """The exact reverse KL between two next-token distributions at each position.

    KL(pi || pi_ref) = sum_v pi(v) (log pi(v) - log pi_ref(v)), the divergence of Rafailov et al. (2023), eq.
    3.

    Args:
      logits: [B, T, V] float, the policy's; -inf marks a token that it cannot sample.
      ref_logits: [B, T, V] float, the reference's; held constant.

    Returns:
      [B, T] float32, nats, at least 0.

    Raises:
      TypeError: an argument is not floating.
      ValueError: wrong rank, or shapes that differ.

    >>> full_kl(jnp.log(jnp.array([[[0.5, 0.5]]])), jnp.log(jnp.array([[[0.25, 0.75]]])))
    Array([[0.143...]], dtype=float32)
    """
    logits, ref_logits, broken = _checked_logits(logits, ref_logits)
    return jnp.where(broken, jnp.nan, _relative_entropy(logits, ref_logits))


def full_forward_kl(logits: jax.typing.ArrayLike, ref_logits: jax.typing.ArrayLike) -> jax.Array:
    """The exact forward KL at each position: cross-entropy to the reference, minus its entropy
    (distillation).

    KL(pi_ref || pi) = sum_v pi_ref(v) (log pi_ref(v) - log pi(v)), the divergence that distribution matching
    minimises (Khalifa, Elsahar & Dymetman 2021).

    Args:
      logits: [B, T, V] float, the policy's.
      ref_logits: [B, T, V] float, the distribution to match; held constant.

    Returns:
      [B, T] float32, nats, at least 0.

    Raises:
      TypeError: an argument is not floating.
      ValueError: wrong rank, or shapes that differ.

    >>> full_forward_kl(jnp.log(jnp.array([[[0.5, 0.5]]])), jnp.log(jnp.array([[[0.25, 0.75]]])))
    Array([[0.130...]], dtype=float32)
    """
    logits, ref_logits, broken = _checked_logits(logits, ref_logits)
    return jnp.where(broken, jnp.nan, _relative_entropy(ref_logits, logits))


def kl_penalized_rewards(
    scores: jax.typing.ArrayLike,
    kl: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    beta: float | jax.Array,
) -> jax.Array:
    """Per-token rewards of a scored response: minus beta KL on every token, the score on the last one.

    R_t = -beta kl_t + 1[t is the last response token] r(x, y): the modified reward R of Ziegler et al. (2019),
    section 2, token by token.
    The last response token is EOS when there is one. Rewards are constants of the objective: no gradient
    passes.

    Args:
      scores: [B] float, one score a response.
      kl: [B, T] float, nats; usually `kl_k1` of the sampled tokens.
      mask: [B, T] bool, True on response tokens, EOS included.
      beta: the leash, above 0. Without a leash, pass a ``kl`` of zeros.

    Returns:
      [B, T] float32, 0 where masked out. The score of a row without tokens lands nowhere.

    Raises:
      TypeError: ``scores`` or ``kl`` is not floating, or ``mask`` not boolean.
      ValueError: wrong rank, shapes that disagree, or ``beta`` not above 0.

    >>> kl, mask = jnp.array([[0.5, 1.0, 9.0]]), jnp.array([[True, True, False]])
    >>> kl_penalized_rewards(jnp.array([2.0]), kl, mask, beta=0.1)
    Array([[-0.05,  1.9...,  0.  ]], dtype=float32)
    """
    scores = checks.floating("scores", scores, "B")
    kl = checks.floating("kl", kl, "B T")
    mask = checks.boolean("mask", mask, ("kl", kl))
    checks.rows("scores", scores, ("kl", kl))
    checks.positive("beta", beta, "without a leash, pass a kl of zeros")
    later = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
    is_last = mask & (later == 1)
    penalty = jnp.where(mask, -beta * jnp.where(mask, kl, 0.0), 0.0)
    return jax.lax.stop_gradient(penalty + jnp.where(is_last, scores[:, None], 0.0))


def adaptive_beta(
    beta: float | jax.Array,
    observed_kl: float | jax.Array,
    *,
    target: float,
    horizon: float,
    batch_size: float | jax.Array,
) -> jax.Array:
    """The next leash: tighter when the KL is above its target, looser when below.

    beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) batch_size / horizon): Ziegler et al. (2019), section
    2.2, with the gain written as in their code. They start at 0.15, with a target of 6 nats a response, a
    horizon of 10,000 episodes.

    Args:
      beta: [] the present leash, above 0.
      observed_kl: [] nats a response, the mean over the batch just seen.
      target: nats a response, above 0.
      horizon: episodes over which a persistent error would change beta by its own size, above 0.
      batch_size: episodes just seen.

    Returns:
      [] float32.

    Raises:
      ValueError: a concrete ``beta``, ``target``, ``horizon`` or ``batch_size`` is not above 0.

    >>> round(float(adaptive_beta(0.15, 60.0, target=6.0, horizon=10_000, batch_size=500)), 4)
    0.1515
    """
    for name, value in [("beta", beta), ("target", target), ("horizon", horizon), ("batch_size", batch_size)]:
        checks.positive(name, value)
    error = jnp.clip(
        jnp.asarray(observed_kl, jnp.float32) / target - 1.0, -ADAPTIVE_BETA_STEP, ADAPTIVE_BETA_STEP
    )
    return jax.lax.stop_gradient(beta * (1.0 + error * batch_size / horizon))


def _relative_entropy(logits: jax.Array, other_logits: jax.Array) -> jax.Array:
    """sum_v p (log p - log q); a token that p cannot sample contributes 0, whatever q says."""
    log_p, log_q = jax.nn.log_softmax(logits, axis=-1), jax.nn.log_softmax(other_logits, axis=-1)
    reachable = log_p > -jnp.inf
    difference = jnp.where(reachable, log_p, 0.0) - jnp.where(reachable, log_q, 0.0)
    return jnp.sum(jnp.where(reachable, jnp.exp(log_p), 0.0) * difference, axis=-1)


def _checked_pair(
    log_probs: jax.typing.ArrayLike, ref_log_probs: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    log_probs = checks.floating("log_probs", log_probs, "B T", "B")
    ref_log_probs = checks.floating("ref_log_probs", ref_log_probs, like=("log_probs", log_probs))
    return log_probs, jax.lax.stop_gradient(ref_log_probs)


def _checked_logits(
    logits: jax.typing.ArrayLike, ref_logits: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    logits = checks.floating("logits", logits, "B T V")
    ref_logits = checks.floating("ref_logits", ref_logits, like=("logits", logits))
    ref_logits = jax.lax.stop_gradient(ref_logits)
    unusable, ref_unusable = (jnp.isnan(x) | (x == jnp.inf) for x in (logits, ref_logits))
    broken = jnp.any(unusable | ref_unusable, axis=-1)
    return jnp.where(unusable, 0.0, logits), jnp.where(ref_unusable, 0.0, ref_logits), broken
