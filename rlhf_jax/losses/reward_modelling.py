"""Reward models from comparisons and rankings of responses; imports jax, masking and checks only."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.losses import checks
from rlhf_jax.masking import elementwise

__all__ = [
    "bradley_terry_loss",
    "length_moments",
    "length_penalty_loss",
    "pairwise_ranking_loss",
    "plackett_luce_loss",
]


def bradley_terry_loss(
    chosen_rewards: jax.typing.ArrayLike,
    rejected_rewards: jax.typing.ArrayLike,
    *,
    margin: jax.typing.ArrayLike = 0.0,
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
        return noisy_cross_entropy(chosen - rejected - margin, label_smoothing) + centering * jnp.square(
            chosen + rejected
        )

    return elementwise(loss, chosen, rejected, jax.lax.stop_gradient(margins))


def pairwise_ranking_loss(
    rewards: jax.typing.ArrayLike,
    ranks: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    probability: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Bradley-Terry over every ordered pair of a prompt's ranked responses, averaged per prompt.

    -(1 / pairs) sum_{i ranked before j} log sigmoid(r_i - r_j): Ouyang et al. (2022), eq. 1. Averaging within
    the prompt keeps one with K responses from weighing K (K - 1) / 2 times as much as one with two.

    Args:
      rewards: [N, K] float, one reward a response.
      ranks: [N, K] int or float, smaller is better; responses of equal rank make no pair. Held constant.
      mask: [N, K] bool, True where there is a response.
      probability: [N, K, K] float in [0, 1], how likely it is that response i is better than response j, read where i
        is ranked before j: the loss is then the cross-entropy to it. None: certain. Held constant.

    Returns:
      [N] float32, nats a pair; 0 for a prompt without a pair.

    Raises:
      TypeError: ``rewards`` or ``probability`` is not floating, ``ranks`` not numbers or ``mask`` not boolean.
      ValueError: wrong rank, or shapes that differ.

    >>> ranks, mask = jnp.array([[1, 2, 2]]), jnp.ones((1, 3), bool)
    >>> pairwise_ranking_loss(jnp.array([[1.0, 0.0, 0.0]]), ranks, mask)
    Array([0.3132...], dtype=float32)
    """
    rewards, ranks, mask = _checked_ranking(rewards, ranks, mask)
    is_pair = mask[:, :, None] & mask[:, None, :] & (ranks[:, :, None] < ranks[:, None, :])
    margins = rewards[:, :, None] - rewards[:, None, :]
    losses = jax.nn.softplus(-margins)
    if probability is not None:
        likely = checks.floating("probability", probability, like=("the pairs of rewards", is_pair))
        likely = jax.lax.stop_gradient(jnp.where(is_pair, likely, 1.0))
        losses = likely * losses + (1.0 - likely) * jax.nn.softplus(margins)
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
      TypeError: ``rewards`` is not floating, ``ranks`` not numbers or ``mask`` not boolean.
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


def length_moments(
    rewards: jax.typing.ArrayLike, lengths: jax.typing.ArrayLike, mask: jax.typing.ArrayLike
) -> jax.Array:
    """How rewards and lengths vary together among the responses to one prompt.

    Sums over a prompt's responses of (r - mean r)^2, (r - mean r)(l - mean l) and (l - mean l)^2. Averaged over prompts
    they give the correlation within prompts, covariance / sqrt(reward variance * length variance): the part of a
    reward's taste for length that a policy can use, as what prompts differ by is out of its reach.

    Args:
      rewards: [N, K] float, one reward a response.
      lengths: [N, K] float, tokens of each response. Held constant.
      mask: [N, K] bool, True where there is a response.

    Returns:
      [N, 3] float32: reward variance, covariance (in rewards times tokens), length variance; 0 for a prompt with fewer
      than two responses.

    Raises:
      TypeError: ``rewards`` or ``lengths`` is not floating, or ``mask`` not boolean.
      ValueError: wrong rank, or shapes that differ.

    >>> length_moments(jnp.array([[2.0, 0.0]]), jnp.array([[7.0, 3.0]]), jnp.ones((1, 2), bool))
    Array([[2., 4., 8.]], dtype=float32)
    """
    rewards = checks.floating("rewards", rewards, "N K")
    lengths = jax.lax.stop_gradient(checks.floating("lengths", lengths, like=("rewards", rewards)))
    mask = checks.boolean("mask", mask, ("rewards", rewards))
    rewards, lengths = _centred(rewards, mask), _centred(lengths, mask)
    products = (jnp.square(rewards), rewards * lengths, jnp.square(lengths))
    return jnp.stack([jnp.sum(product, axis=1) for product in products], axis=1)


def length_penalty_loss(
    rewards: jax.typing.ArrayLike,
    lengths: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    reward_variance: jax.typing.ArrayLike,
    covariance: jax.typing.ArrayLike,
    length_variance: jax.typing.ArrayLike,
) -> jax.Array:
    """The squared correlation of rewards with lengths, as a mean over prompts that any split of a batch adds up to.

    With a prompt's own moments v, c (`length_moments`) and the batch's mean moments V, C, L held constant:
    2 C / (V L) c - (C / V)^2 / L v. Over the batch this has the mean C^2 / (V L) = rho^2, and that mean's gradient
    is the gradient of rho^2. The penalty on a reward's correlation with length is Chen et al. (2024, ODIN), L^L, which
    takes |rho| over all responses of a batch; here it is squared, so as to be smooth at 0, and taken within prompts.

    Args:
      rewards: [N, K] float, one reward a response.
      lengths: [N, K] float, tokens of each response. Held constant.
      mask: [N, K] bool, True where there is a response.
      reward_variance: [N] float, V, the same number for every prompt of a batch. Held constant.
      covariance: [N] float, C, likewise.
      length_variance: [N] float, L, likewise.

    Returns:
      [N] float32 without unit, whose mean is rho^2, in [0, 1]; 0 where either variance is 0.

    Raises:
      TypeError: an argument is not floating, or ``mask`` not boolean.
      ValueError: wrong rank, or shapes that differ.

    >>> rewards, lengths, mask = jnp.array([[2.0, 0.0]]), jnp.array([[7.0, 3.0]]), jnp.ones((1, 2), bool)
    >>> length_penalty_loss(rewards, lengths, mask, *length_moments(rewards, lengths, mask).T)
    Array([1.], dtype=float32)
    """
    variance, shared, _ = length_moments(rewards, lengths, mask).T
    like = ("a reward a prompt", variance)
    total, joint, spread = (
        jax.lax.stop_gradient(checks.floating(name, value, like=like))
        for name, value in (
            ("reward_variance", reward_variance),
            ("covariance", covariance),
            ("length_variance", length_variance),
        )
    )
    known = (total > 0) & (spread > 0)
    slope = jnp.where(known, joint, 0.0) / jnp.where(known, total, 1.0)
    return slope * (2.0 * shared - slope * variance) / jnp.where(known, spread, 1.0)


def noisy_cross_entropy(logit: jax.Array, label_smoothing: float) -> jax.Array:
    """-(1 - eps) log sigmoid(logit) - eps log sigmoid(-logit): eps of the labels are taken to be flipped."""
    return (1.0 - label_smoothing) * jax.nn.softplus(-logit) + label_smoothing * jax.nn.softplus(logit)


def _centred(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Each row less its mean over the mask, 0 off it."""
    values = jnp.where(mask, values, 0.0)
    counts = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1).astype(values.dtype)
    return jnp.where(mask, values - jnp.sum(values, axis=1, keepdims=True) / counts, 0.0)


def _checked_ranking(rewards, ranks, mask) -> tuple[jax.Array, jax.Array, jax.Array]:
    rewards = checks.floating("rewards", rewards, "N K")
    mask = checks.boolean("mask", mask, ("rewards", rewards))
    ranks = jnp.asarray(ranks)
    if not jnp.issubdtype(ranks.dtype, jnp.number):
        raise TypeError(f"ranks must be numbers, smaller is better, got {ranks.dtype}")
    if ranks.shape != rewards.shape:
        raise ValueError(
            f"ranks must have the shape of rewards, {list(rewards.shape)}, got {list(ranks.shape)}"
        )
    return jnp.where(mask, rewards, 0.0), jax.lax.stop_gradient(ranks), mask
