"""How likely a policy finds given tokens: log-probabilities and entropies; imports jax, masking and checks
only.

Supervised fine-tuning is a composition, not a function of its own: the loss of a token is minus its
log-probability, ``masking.token_mean(-token_log_probs(logits, targets), mask).mean()``.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from rlhf_jax.losses import checks
from rlhf_jax.masking import masked_mean, masked_sum

__all__ = [
    "chunked_token_log_probs",
    "sequence_log_probs",
    "sequence_mean_log_probs",
    "token_entropy",
    "token_log_probs",
]


def token_log_probs(
    logits: jax.typing.ArrayLike, targets: jax.typing.ArrayLike, *, temperature: float | jax.Array = 1.0
) -> jax.Array:
    """Log-probability of each target under the softmax of its logits.

    log pi(y_t | x, y_<t) = z_t[y_t] / tau - logsumexp(z_t / tau), the summand of Ouyang et al. (2022), eq.
    2's second expectation. Nothing is held constant.

    Args:
      logits: [B, T, V] float, any float dtype. -inf marks a token that cannot be sampled.
      targets: [B, T] int, token ids in [0, V).
      temperature: tau, above 0; the one the tokens were sampled with.

    Returns:
      [B, T] float32, nats. NaN with zero gradient where a position's logits hold NaN or +inf, or its target
      is V or more.

    Raises:
      TypeError: ``logits`` is not floating or ``targets`` not integer.
      ValueError: wrong rank, shapes that disagree, or ``temperature`` not above 0.

    >>> logits = jnp.log(jnp.array([[[0.25, 0.75]]]))
    >>> token_log_probs(logits, jnp.array([[1]]))  # log 0.75
    Array([[-0.2876...]], dtype=float32)
    """
    logits = checks.floating("logits", logits, "B T V")
    checks.positive("temperature", temperature)
    logits, broken = tempered(logits, temperature)
    targets = checks.integral("targets", targets, shape=logits.shape[:-1])
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.where(broken, jnp.nan, chosen - jax.nn.logsumexp(logits, axis=-1))


def token_entropy(logits: jax.typing.ArrayLike, *, temperature: float | jax.Array = 1.0) -> jax.Array:
    """Entropy of the next-token distribution at each position.

    H_t = -sum_v p_t(v) log p_t(v), p_t = softmax(z_t / tau): the bonus S of Schulman et al. (2017), eq. 9. An
    entropy bonus is a composition: ``token_mean(clipped_surrogate_loss(...) - coefficient *
    token_entropy(logits), mask)``.

    Args:
      logits: [B, T, V] float; -inf marks a token that cannot be sampled.
      temperature: tau, above 0.

    Returns:
      [B, T] float32, nats, in [0, log V].

    Raises:
      TypeError: ``logits`` is not floating.
      ValueError: wrong rank, or ``temperature`` not above 0.

    >>> token_entropy(jnp.zeros((1, 1, 4)))  # log 4
    Array([[1.386...]], dtype=float32)
    """
    logits = checks.floating("logits", logits, "B T V")
    checks.positive("temperature", temperature)
    logits, broken = tempered(logits, temperature)
    return jnp.where(broken, jnp.nan, _entropy(logits))


def sequence_log_probs(log_probs: jax.typing.ArrayLike, mask: jax.typing.ArrayLike) -> jax.Array:
    """Log-probability of each whole response: the sum over its tokens.

    log pi(y | x) = sum_t log pi(y_t | x, y_<t), as Rafailov et al. (2023), eq. 7, takes it.

    Args:
      log_probs: [B, T] float, nats.
      mask: [B, T] bool, True on response tokens.

    Returns:
      [B] float32; 0 for a row without tokens.

    Raises:
      TypeError: ``log_probs`` is not floating or ``mask`` not boolean.
      ValueError: wrong rank, or shapes that differ.

    >>> sequence_log_probs(jnp.array([[-1.0, -2.0, jnp.nan]]), jnp.array([[True, True, False]]))
    Array([-3.], dtype=float32)
    """
    return masked_sum(checks.floating("log_probs", log_probs, "B T"), mask, axis=1)


def sequence_mean_log_probs(log_probs: jax.typing.ArrayLike, mask: jax.typing.ArrayLike) -> jax.Array:
    """Log-probability of each response per token: what SimPO, ORPO and TRL's IPO compare.

    (1 / |y|) log pi(y | x), Meng et al. (2024), eq. 4.

    Args:
      log_probs: [B, T] float, nats.
      mask: [B, T] bool, True on response tokens.

    Returns:
      [B] float32; 0 for a row without tokens.

    Raises:
      TypeError: ``log_probs`` is not floating or ``mask`` not boolean.
      ValueError: wrong rank, or shapes that differ.

    >>> sequence_mean_log_probs(jnp.array([[-1.0, -2.0, jnp.nan]]), jnp.array([[True, True, False]]))
    Array([-1.5], dtype=float32)
    """
    return masked_mean(checks.floating("log_probs", log_probs, "B T"), mask, axis=1)


def chunked_token_log_probs(
    hidden: jax.typing.ArrayLike,
    unembedding: jax.typing.ArrayLike,
    targets: jax.typing.ArrayLike,
    *,
    chunk_size: int,
    temperature: float | jax.Array = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies straight from the last hidden states, never holding [B, T, V].

    Equals ``token_log_probs(hidden @ unembedding.T, targets)`` and ``token_entropy(hidden @ unembedding.T)``,
    forward and backward, with ``chunk_size`` rows of logits alive at a time: the backward pass computes them
    again.

    Args:
      hidden: [B, T, D] float, the states that predict ``targets``.
      unembedding: [V, D] float, one row a token (a tied embedding table as it is).
      targets: [B, T] int, token ids in [0, V).
      chunk_size: how many of the B * T positions share one [chunk_size, V] block of logits.
      temperature: tau, above 0; the one the tokens were sampled with.

    Returns:
      log_probs: [B, T] float32, nats.
      entropy: [B, T] float32, nats. Costs a backward pass nothing when it is not differentiated.
      Both are NaN, with zero gradient, at a position whose hidden state is not finite.

    Raises:
      TypeError: ``hidden`` or ``unembedding`` is not floating, or ``targets`` not integer.
      ValueError: wrong rank, shapes that disagree, or ``chunk_size`` or ``temperature`` not above 0.

    >>> hidden, unembedding = jnp.array([[[1.0, 0.0]]]), jnp.log(jnp.array([[0.25, 1.0], [0.75, 1.0]]))
    >>> log_probs, entropy = chunked_token_log_probs(hidden, unembedding, jnp.array([[1]]), chunk_size=1)
    >>> jnp.exp(log_probs), entropy
    (Array([[0.7...]], dtype=float32), Array([[0.562...]], dtype=float32))
    """
    hidden = checks.floating("hidden", hidden, "B T D")
    unembedding = checks.floating("unembedding", unembedding, "V D")
    if hidden.shape[-1] != unembedding.shape[-1]:
        wanted = f"[V, {hidden.shape[-1]}], hidden's D"
        raise ValueError(f"unembedding must have shape {wanted}, got {list(unembedding.shape)}")
    targets = checks.integral("targets", targets, shape=hidden.shape[:-1])
    checks.positive("chunk_size", chunk_size)
    checks.positive("temperature", temperature)
    rows = math.prod(targets.shape)
    chunks = max(1, -(-rows // chunk_size))
    padded = -(-rows // chunks) * chunks

    def fold(x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [chunks, rows of a chunk, ...], strided: each chunk spreads over a sharded B."""
        x = x.reshape(rows, *x.shape[2:])
        x = jnp.pad(x, [(0, padded - rows)] + [(0, 0)] * (x.ndim - 1))
        return jnp.swapaxes(x.reshape(padded // chunks, chunks, *x.shape[1:]), 0, 1)

    def unfold(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, 0, 1).reshape(padded)[:rows].reshape(targets.shape)

    broken = ~jnp.all(jnp.isfinite(hidden), axis=-1)
    states = fold(jnp.where(broken[..., None], 0.0, hidden / temperature))
    log_probs, entropy = _chunked(states, unembedding, fold(targets))
    return jnp.where(broken, jnp.nan, unfold(log_probs)), jnp.where(broken, jnp.nan, unfold(entropy))


def tempered(logits: jax.Array, temperature: float | jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits over temperature with NaN and +inf entries zeroed, and [B, T], the positions that held any."""
    unusable = jnp.isnan(logits) | (logits == jnp.inf)
    return jnp.where(unusable, 0.0, logits) / temperature, jnp.any(unusable, axis=-1)


def _entropy(logits: jax.Array) -> jax.Array:
    """logsumexp(z) - sum p z, with z shifted by its maximum so that large logits do not cancel."""
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    reachable = jnp.where(shifted == -jnp.inf, 0.0, shifted)
    mean = jnp.sum(jax.nn.softmax(shifted, axis=-1) * reachable, axis=-1)
    return jax.nn.logsumexp(shifted, axis=-1) - mean


@jax.custom_vjp
def _chunked(states: jax.Array, unembedding: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[C, R, D], [V, D], [C, R] -> log-probs [C, R], entropy [C, R]."""
    return _chunked_forward(states, unembedding, targets)[0]


def _chunked_forward(states, unembedding, targets):
    def one(_, chunk):
        state, target = chunk
        logits = state @ unembedding.T
        peak = jnp.max(logits, axis=-1, keepdims=True)
        shifted = logits - peak
        weights = jnp.exp(shifted)
        total = jnp.sum(weights, axis=-1)
        normaliser = jnp.log(total)
        entropy = normaliser - jnp.sum(weights * shifted, axis=-1) / total
        chosen = jnp.take_along_axis(shifted, target[:, None], axis=-1)[:, 0]
        return None, (chosen - normaliser, entropy, peak[:, 0] + normaliser)

    _, (log_probs, entropy, normalisers) = jax.lax.scan(one, None, (states, targets))
    return (log_probs, entropy), (states, unembedding, targets, entropy, normalisers)


def _chunked_backward(residuals, cotangents):
    """d log p(y) / dz = 1_y - p;  dH / dz = -p (log p + H)."""
    states, unembedding, targets, entropy, normalisers = residuals

    def one(unembedding_cotangent, chunk):
        state, target, entropy, normaliser, for_log_prob, for_entropy = chunk
        log_p = state @ unembedding.T - normaliser[:, None]
        pull = for_log_prob[:, None] + for_entropy[:, None] * (log_p + entropy[:, None])
        is_target = jnp.arange(unembedding.shape[0])[None, :] == target[:, None]
        logits_cotangent = jnp.where(is_target, for_log_prob[:, None], 0.0) - jnp.exp(log_p) * pull
        return unembedding_cotangent + logits_cotangent.T @ state, logits_cotangent @ unembedding

    scanned = (states, targets, entropy, normalisers, *cotangents)
    unembedding_cotangent, states_cotangent = jax.lax.scan(one, jnp.zeros_like(unembedding), scanned)
    return states_cotangent, unembedding_cotangent, None


_chunked.defvjp(_chunked_forward, _chunked_backward)
