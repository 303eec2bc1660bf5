"""Policy-gradient losses on sampled tokens; imports jax, masking, checks and kl only.

All are to be minimised, per token or per response, unreduced. Advantages, behaviour log-probabilities and
weights are held constant. Named recipes are compositions of an advantage, a loss here and a reduction of
`rlhf_jax.masking`:

- PPO: `generalized_advantage_estimation`, `masked_whiten`, `clipped_surrogate_loss`, `token_mean`.
- RLOO: `leave_one_out_advantages`, `reinforce_loss`, `sequence_mean_of_token_sums`.
- GRPO: `group_relative_advantages`, `clipped_surrogate_loss` + beta * `kl_k3`,
  `sequence_mean_of_token_means`.
- Dr. GRPO: `group_relative_advantages(scale=False)`, `clipped_surrogate_loss`, `fixed_length_mean`.
- DAPO: `group_relative_advantages`, `clipped_surrogate_loss(clip_low=0.2, clip_high=0.28)`, `token_mean`.
- GSPO: `group_relative_advantages`, `sequence_clipped_surrogate_loss`, a mean over sequences.
- Entropy bonus: subtract ``coefficient * token_entropy(logits)`` from any of them before the reduction.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.losses import checks
from rlhf_jax.losses.kl import LOG_RATIO_BOUND
from rlhf_jax.masking import elementwise, masked_mean

__all__ = [
    "advantage_weighted_loss",
    "clipped_surrogate_loss",
    "distribution_matching_loss",
    "reinforce_loss",
    "reward_weighted_loss",
    "sequence_clipped_surrogate_loss",
]


def reinforce_loss(log_probs: jax.typing.ArrayLike, advantages: jax.typing.ArrayLike) -> jax.Array:
    """The score-function estimator: its gradient averages to minus the gradient of the expected reward.

    -A log pi(y): Williams (1992), theorem 1.

    Args:
      log_probs: [B, T] or [B] float, nats, of sampled tokens or responses.
      advantages: the same shape; held constant.

    Returns:
      The same shape, float32.

    Raises:
      TypeError: an argument is not floating.
      ValueError: wrong rank, or shapes that differ.

    >>> reinforce_loss(jnp.array([-0.5, -2.0]), jnp.array([1.0, -1.0]))
    Array([ 0.5, -2. ], dtype=float32)
    """
    log_probs, advantages = _checked_pair(log_probs, "advantages", advantages)
    return elementwise(lambda log_prob, advantage: -advantage * log_prob, log_probs, advantages)


def clipped_surrogate_loss(
    log_probs: jax.typing.ArrayLike,
    old_log_probs: jax.typing.ArrayLike,
    advantages: jax.typing.ArrayLike,
    *,
    clip_low: float | jax.Array = 0.2,
    clip_high: float | jax.Array = 0.2,
) -> jax.Array:
    """PPO's surrogate: importance-weighted advantage, with no reward for leaving [1 - clip_low, 1 +
    clip_high].

    max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)), rho = pi / pi_old: Schulman et al. (2017), eq. 7;
    unequal clips are Yu et al. (2025)'s clip-higher. log rho is cut at +-20.

    Args:
      log_probs: [B, T] float, nats, of the sampled tokens under the policy.
      old_log_probs: [B, T] float, under the policy that sampled them; held constant.
      advantages: [B, T] float; held constant.
      clip_low: how far below 1 the ratio may be credited, in [0, 1].
      clip_high: how far above 1, at least 0.

    Returns:
      [B, T] float32.

    Raises:
      TypeError: an array is not floating.
      ValueError: wrong rank, shapes that differ, or a clip outside its range.

    >>> log_ratios = jnp.log(jnp.array([[0.5, 1.0, 1.5]]))
    >>> clipped_surrogate_loss(log_ratios, jnp.zeros((1, 3)), jnp.array([[1.0, -1.0, 2.0]]))[0].tolist()
    [-0.5, 1.0, -2.4...]
    """
    log_probs = checks.floating("log_probs", log_probs, "B T")
    old_log_probs = checks.floating("old_log_probs", old_log_probs, like=("log_probs", log_probs))
    advantages = checks.floating("advantages", advantages, like=("log_probs", log_probs))
    checks.fraction("clip_low", clip_low)
    checks.non_negative("clip_high", clip_high)

    def loss(new: jax.Array, old: jax.Array, advantage: jax.Array) -> jax.Array:
        return _surrogate(_bounded_exp(new - old), advantage, clip_low, clip_high)

    return elementwise(loss, log_probs, *jax.lax.stop_gradient((old_log_probs, advantages)))


def sequence_clipped_surrogate_loss(
    log_probs: jax.typing.ArrayLike,
    old_log_probs: jax.typing.ArrayLike,
    advantages: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    clip_low: float | jax.Array = 0.2,
    clip_high: float | jax.Array = 0.2,
) -> jax.Array:
    """PPO's surrogate with one ratio a response, the geometric mean of its token ratios (GSPO).

    max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high)), s = exp(mean_t (log pi - log pi_old)): Zheng et al.
    (2025), eq. 5 and 7. Advantages a token give their GSPO-token, eq. 13 and 14: every token has the value of
    s and the gradient of its own log-probability. log s is cut at +-20.

    Args:
      log_probs: [B, T] float, nats, of the sampled tokens under the policy.
      old_log_probs: [B, T] float, under the policy that sampled them; held constant.
      advantages: [B] float, one a response, or [B, T] float; held constant.
      mask: [B, T] bool, True on response tokens.
      clip_low: how far below 1 the ratio may be credited, in [0, 1]; the paper's runs use 3e-4.
      clip_high: how far above 1, at least 0; the paper's runs use 4e-4.

    Returns:
      float32 of the shape of ``advantages``: [B], 0 for a row without tokens; or [B, T], 0 where masked out,
      to be reduced by `sequence_mean_of_token_means`.

    Raises:
      TypeError: an array is not floating, or ``mask`` not boolean.
      ValueError: wrong rank, shapes that disagree, or a clip outside its range.

    >>> log_ratios = jnp.log(jnp.array([[2.0, 0.5, 1.5]]))
    >>> mask = jnp.array([[True, True, False]])
    >>> sequence_clipped_surrogate_loss(log_ratios, jnp.zeros((1, 3)), jnp.array([3.0]), mask)
    Array([-3.], dtype=float32)
    """
    log_probs = checks.floating("log_probs", log_probs, "B T")
    old_log_probs = checks.floating("old_log_probs", old_log_probs, like=("log_probs", log_probs))
    advantages = checks.floating("advantages", advantages, "B", "B T")
    checks.rows("advantages", advantages, ("log_probs", log_probs))
    mask = checks.boolean("mask", mask, ("log_probs", log_probs))
    checks.fraction("clip_low", clip_low)
    checks.non_negative("clip_high", clip_high)
    old_log_probs, advantages = jax.lax.stop_gradient((old_log_probs, advantages))
    new = jnp.where(mask, log_probs, 0.0)
    log_ratio = masked_mean(new - jnp.where(mask, old_log_probs, 0.0), mask, axis=1)
    counts = jnp.any(mask, axis=1)
    if advantages.ndim == 2:
        checks.floating("advantages", advantages, like=("log_probs", log_probs))
        log_ratio = jax.lax.stop_gradient(log_ratio)[:, None] + new - jax.lax.stop_gradient(new)
        counts = mask
    losses = _surrogate(_bounded_exp(log_ratio), jnp.where(counts, advantages, 0.0), clip_low, clip_high)
    return jnp.where(counts, losses, 0.0)


def advantage_weighted_loss(
    log_probs: jax.typing.ArrayLike,
    advantages: jax.typing.ArrayLike,
    *,
    temperature: float | jax.Array,
    max_weight: float | jax.Array,
) -> jax.Array:
    """Supervised learning on one's own samples, the better ones weighing exponentially more.

    -min(exp(A / temperature), max_weight) log pi(y): Peng et al. (2019), algorithm 1, with its weight clip.

    Args:
      log_probs: [B, T] or [B] float, nats, of sampled tokens or responses.
      advantages: the same shape; held constant.
      temperature: Peng's beta, in units of advantage, above 0.
      max_weight: the largest weight, above 0 (20 in their code).

    Returns:
      The same shape, float32.

    Raises:
      TypeError: an array is not floating.
      ValueError: wrong rank, shapes that differ, or a number not above 0.

    >>> advantages = jnp.array([0.0, 100.0])
    >>> advantage_weighted_loss(jnp.array([-1.0, -1.0]), advantages, temperature=1.0, max_weight=16.0)
    Array([ 1., 16.], dtype=float32)
    """
    checks.positive("temperature", temperature)
    checks.positive("max_weight", max_weight)
    log_probs, advantages = _checked_pair(log_probs, "advantages", advantages)
    return elementwise(
        lambda log_prob, advantage: -_capped_exp(advantage / temperature, max_weight) * log_prob,
        log_probs,
        advantages,
    )


def reward_weighted_loss(
    log_probs: jax.typing.ArrayLike,
    rewards: jax.typing.ArrayLike,
    *,
    temperature: float | jax.Array,
    max_weight: float | jax.Array,
) -> jax.Array:
    """`advantage_weighted_loss` without a baseline: the reward itself is the exponent.

    -min(exp(r / temperature), max_weight) log pi(y): Peters & Schaal (2007)'s reward-weighted regression, in
    the form that Peng et al. (2019) give it. On samples of pi_ref its minimiser is pi_ref exp(r /
    temperature) / Z.

    Args:
      log_probs: [B, T] or [B] float, nats, of sampled tokens or responses.
      rewards: the same shape; held constant.
      temperature: in units of reward, above 0; the leash beta.
      max_weight: the largest weight, above 0.

    Returns:
      The same shape, float32.

    Raises:
      TypeError: an array is not floating.
      ValueError: wrong rank, shapes that differ, or a number not above 0.

    >>> reward_weighted_loss(jnp.array([-1.0]), jnp.array([2.0]), temperature=2.0, max_weight=20.0)  # e
    Array([2.718...], dtype=float32)
    """
    checks.positive("temperature", temperature)
    checks.positive("max_weight", max_weight)
    log_probs, rewards = _checked_pair(log_probs, "rewards", rewards)
    return elementwise(
        lambda log_prob, reward: -_capped_exp(reward / temperature, max_weight) * log_prob, log_probs, rewards
    )


def distribution_matching_loss(
    log_probs: jax.typing.ArrayLike,
    behaviour_log_probs: jax.typing.ArrayLike,
    target_log_weights: jax.typing.ArrayLike,
    *,
    max_weight: float | jax.Array,
) -> jax.Array:
    """Moves the policy to a target distribution known up to a constant (GDC): its gradient is the forward
    KL's.

    -min(P(y) / q(y), max_weight) log pi(y), y sampled from q: the distributional policy gradient of Khalifa,
    Elsahar & Dymetman (2021), whose average is Z times the gradient of KL(p || pi), p = P / Z. With log P =
    log pi_ref + r / beta the target is the optimum of the KL-leashed objective.

    Args:
      log_probs: [B] float, log pi(y), nats, summed over response tokens.
      behaviour_log_probs: [B] float, log q(y), of the distribution that sampled y; held constant.
      target_log_weights: [B] float, log P(y), unnormalised; held constant.
      max_weight: the largest importance weight, above 0.

    Returns:
      [B] float32.

    Raises:
      TypeError: an array is not floating.
      ValueError: wrong rank, shapes that differ, or ``max_weight`` not above 0.

    >>> half, quarter = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25]))
    >>> distribution_matching_loss(half, quarter, half, max_weight=10.0)  # 2 log 2
    Array([1.386...], dtype=float32)
    """
    log_probs = checks.floating("log_probs", log_probs, "B")
    like = ("log_probs", log_probs)
    behaviour = checks.floating("behaviour_log_probs", behaviour_log_probs, like=like)
    target = checks.floating("target_log_weights", target_log_weights, like=like)
    checks.positive("max_weight", max_weight)
    return elementwise(
        lambda new, behaviour, target: -_capped_exp(target - behaviour, max_weight) * new,
        log_probs,
        *jax.lax.stop_gradient((behaviour, target)),
    )


def _surrogate(
    ratio: jax.Array, advantage: jax.Array, clip_low: float | jax.Array, clip_high: float | jax.Array
) -> jax.Array:
    return jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high))


def _bounded_exp(log_ratio: jax.Array) -> jax.Array:
    return jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_BOUND, LOG_RATIO_BOUND))


def _capped_exp(exponent: jax.Array, cap: float | jax.Array) -> jax.Array:
    """min(exp(exponent), cap) without ever computing an exp that overflows."""
    return jnp.exp(jnp.minimum(exponent, jnp.log(cap)))


def _checked_pair(
    log_probs: jax.typing.ArrayLike, name: str, weights: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array]:
    log_probs = checks.floating("log_probs", log_probs, "B T", "B")
    return log_probs, jax.lax.stop_gradient(checks.floating(name, weights, like=("log_probs", log_probs)))
