"""How likely a policy finds given tokens: log-probabilities and entropies; imports jax, masking and checks
only.

Supervised fine-tuning is a composition, not a function of its own: the loss of a token is minus its
log-probability, ``masking.token_mean(-token_log_probs(logits, targets), mask).mean()``.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

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

    log pi(y_t | x, y_<t) = z_t[y_t] / tau - logsumexp(z_t / tau), the summand of Radford et al. (2018),
    eq. 1. Nothing is held constant.

    Args:
      logits: [B, T, V] float, any float dtype. -inf marks a token that cannot be sampled.
      targets: [B, T] int, token ids in [0, V).
      temperature: tau, above 0; the one the tokens were sampled with.

    Returns:
      [B, T] float32, nats. NaN with zero gradient where a position's logits hold NaN or +inf, or its target is
      outside [0, V) (-100, say, where a peer marks what it ignores).

    Raises:
      TypeError: ``logits`` is not floating or ``targets`` not integer.
      ValueError: wrong rank, shapes that disagree, or ``temperature`` not above 0.

    >>> logits = jnp.log(jnp.array([[[0.25, 0.75]]]))
    >>> token_log_probs(logits, jnp.array([[1]]))  # log 0.75
    Array([[-0.2876...]], dtype=float32)
    """
    logits = checks.floating("logits", logits, "B T V")
    checks.positive("temperature", temperature)
    targets = checks.integral("targets", targets, shape=logits.shape[:-1])
    return _log_prob_of_target(logits / temperature, targets)


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
    return _entropy(logits / temperature)


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

    (1 / |y|) log pi(y | x), Meng et al. (2024), eq. 3.

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
    softcap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies straight from the last hidden states, never holding [B, T, V].

    Equals ``token_log_probs(hidden @ unembedding.T, targets)`` and ``token_entropy(hidden @ unembedding.T)``,
    forward and backward. As many logits are alive at a time as ``chunk_size`` positions have, chunk_size * V;
    they are cut along the vocabulary (all positions, V * chunk_size / (B * T) tokens), and computed again in
    the backward pass. With 2,040 positions, D = 288, V = 32,000 and chunk_size = 255, in float32 on two CPU cores,
    value and both gradients need 42 MB of temporaries instead of 522 MB and 0.36 s instead of 0.53 s
    (docs/numerics.md). Reverse mode only.

    Args:
      hidden: [B, T, D] float, the states that predict ``targets``.
      unembedding: [V, D] float, one row a token (a tied embedding table as it is).
      targets: [B, T] int, token ids in [0, V).
      chunk_size: positions, of the B * T, whose logits may be alive at a time. A divisor of B * T with a quotient that
        divides V wastes nothing.
      temperature: tau, above 0; the one the tokens were sampled with.
      softcap: c, above 0: logits are c tanh(logits / c) before the temperature divides them (Gemma Team 2024, Gemma 2,
        section 2); None leaves them alone.

    Returns:
      log_probs: [B, T] float32, nats.
      entropy: [B, T] float32, nats. Costs nothing when it is not used.
      Both are NaN, with zero gradient, at a position whose hidden state is not finite; so are the log_probs of a
      target outside [0, V).

    Raises:
      TypeError: ``hidden`` or ``unembedding`` is not floating, or ``targets`` not integer.
      ValueError: wrong rank, shapes that disagree, or ``chunk_size``, ``temperature`` or ``softcap`` not above 0.

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
    # The states carry the temperature, and c tanh(z / c) / tau is c' tanh(z' / c') with c' = c / tau, z' = z / tau.
    cap = None
    if softcap is not None:
        checks.positive("softcap", softcap)
        cap = jnp.asarray(softcap / temperature, hidden.dtype)
    blocks = min(max(1, math.ceil(math.prod(targets.shape) / chunk_size)), unembedding.shape[0])
    broken = ~jnp.all(jnp.isfinite(hidden), axis=-1)
    states = jnp.where(broken[..., None], 0.0, hidden / temperature)
    states, unembedding = _varying_alike(states, unembedding)
    outside = ~_is_token(targets, unembedding.shape[0])
    flat = states.reshape(-1, states.shape[-1]), unembedding, jnp.where(outside, 0, targets).reshape(-1)
    log_probs, entropy = (x.reshape(targets.shape) for x in _blocked(*flat, cap, blocks))
    return jnp.where(broken | outside, jnp.nan, log_probs), jnp.where(broken, jnp.nan, entropy)


# The two functions below have their derivatives written out: one [B, T, V] array is kept for the backward pass, and a
# position whose normaliser is not finite (NaN or +inf among its logits, or nothing but -inf) or whose target is no
# token has value NaN, slope 0.


@jax.custom_jvp
def _log_prob_of_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """[B, T, V], [B, T] -> [B, T]."""
    shifted, _, total = _softmax_parts(logits)
    usable = jnp.isfinite(total) & _is_token(targets, logits.shape[-1])[..., None]
    return jnp.where(usable, _at(shifted, targets) - jnp.log(total), jnp.nan)[..., 0]


@_log_prob_of_target.defjvp
def _log_prob_of_target_jvp(primals, tangents):
    """d log p(y) / dz_v = 1[v = y] - p(v)."""
    (logits, targets), (tangent, _) = primals, tangents
    _, weights, total = _softmax_parts(logits)
    usable = jnp.isfinite(total) & _is_token(targets, logits.shape[-1])[..., None]
    weights, total = jnp.where(usable, weights, 0.0), jnp.where(usable, total, 1.0)
    slope = (
        jnp.where(usable, _at(tangent, targets), 0.0)
        - jnp.sum(weights * tangent, axis=-1, keepdims=True) / total
    )
    return _log_prob_of_target(logits, targets), slope[..., 0]


@jax.custom_jvp
def _entropy(logits: jax.Array) -> jax.Array:
    """[B, T, V] -> [B, T]: log of the sum of exp, less the mean, of logits shifted so that large ones do not cancel."""
    shifted, weights, total = _softmax_parts(logits)
    mean = jnp.sum(jnp.where(weights > 0, weights * shifted, 0.0), axis=-1) / total[..., 0]
    return jnp.where(jnp.isfinite(total[..., 0]), jnp.log(total[..., 0]) - mean, jnp.nan)


@_entropy.defjvp
def _entropy_jvp(primals, tangents):
    """dH / dz_v = -p(v) (log p(v) + H)."""
    (logits,), (tangent,) = primals, tangents
    shifted, weights, total = _softmax_parts(logits)
    entropy = _entropy(logits)
    log_p = jnp.where(weights > 0, shifted - jnp.log(total), 0.0)
    slope = jnp.where(jnp.isfinite(total), -(weights / total) * (log_p + entropy[..., None]), 0.0)
    return entropy, jnp.sum(slope * tangent, axis=-1)


def _at(values: jax.Array, targets: jax.Array) -> jax.Array:
    """[B, T, V], [B, T] -> [B, T, 1]; anything where a target is no token."""
    return jnp.take_along_axis(values, targets[..., None], axis=-1)


def _is_token(targets: jax.Array, vocabulary: int) -> jax.Array:
    """False at ids that JAX would wrap around or fill in for: those outside [0, V)."""
    return (targets >= 0) & (targets < vocabulary)


def _softmax_parts(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits less their peak, exp of that, and its sum over the vocabulary (kept as an axis of one)."""
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(shifted)
    return shifted, weights, jnp.sum(weights, axis=-1, keepdims=True)


# The unembedding is cut into blocks of its rows, the vocabulary, and both passes walk over the blocks: rows stay
# whole, so a sharded batch stays where it is, and the gradient of a block is written once, where a cut along the rows
# would read and write a [V, D] sum at every step. Block k holds the tokens k, k + blocks, k + 2 blocks, ...: strided,
# so that each block spreads over the devices of a sharded vocabulary.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocked(
    states: jax.Array, unembedding: jax.Array, targets: jax.Array, cap: jax.Array | None, blocks: int
) -> tuple[jax.Array, jax.Array]:
    """[N, D], [V, D], [N], [] or None -> log-probs [N], entropy [N]."""
    return _blocked_forward(states, unembedding, targets, cap, blocks)[0]


def _blocked_forward(states, unembedding, targets, cap, blocks):
    """Per block: the peak, log of the sum of exp above it, the entropy within, and the target's logit if it is there.

    The entropy of the whole is that within the blocks plus that of which block: sum_k w_k (H_k - log w_k).
    """
    stacked = _strided(unembedding, blocks)

    def one(block):
        products = _capped(states @ stacked[:, block].T, cap)
        logits = _only_tokens(products, block, blocks, unembedding.shape[0])
        peak = jnp.max(logits, axis=-1)
        shifted = logits - peak[:, None]
        weights = jnp.exp(shifted)
        total = jnp.sum(weights, axis=-1)
        entropy = jnp.log(total) - jnp.sum(jnp.where(weights > 0, weights * shifted, 0.0), axis=-1) / total
        chosen = jnp.take_along_axis(logits, (targets // blocks)[:, None], axis=-1)[:, 0]
        return peak, jnp.log(total), entropy, jnp.where(targets % blocks == block, chosen, 0.0)

    peaks, log_totals, entropies, chosen = jax.lax.map(one, jnp.arange(blocks))
    peak = jnp.max(peaks, axis=0)
    log_totals = log_totals + (peaks - peak[None])
    log_total = jax.nn.logsumexp(log_totals, axis=0)
    log_shares = log_totals - log_total[None]
    entropy = jnp.sum(jnp.exp(log_shares) * (entropies - log_shares), axis=0)
    log_probs = jnp.sum(chosen, axis=0) - peak - log_total
    return (log_probs, entropy), (states, unembedding, targets, cap, entropy, peak + log_total)


def _blocked_backward(blocks, residuals, cotangents):
    """d log p(y) / dz_v = 1[v = y] - p(v);  dH / dz_v = -p(v) (log p(v) + H)."""
    states, unembedding, targets, cap, entropy, normalisers = residuals
    for_log_prob, for_entropy = cotangents
    stacked = _strided(unembedding, blocks)
    places = jnp.arange(stacked.shape[0])[None]

    def one(carry, block):
        states_cotangent, stacked_cotangent, cap_cotangent = carry
        rows = stacked[:, block]
        bare = states @ rows.T
        products = _capped(bare, cap)
        log_p = _only_tokens(products - normalisers[:, None], block, blocks, unembedding.shape[0])
        logits_cotangent = jnp.zeros_like(log_p)
        if not isinstance(for_log_prob, SymbolicZero):
            is_target = places * blocks + block == targets[:, None]
            slope = jnp.where(is_target, 1.0, 0.0) - jnp.exp(log_p)
            logits_cotangent += for_log_prob[:, None] * slope
        if not isinstance(for_entropy, SymbolicZero):
            surprise = jnp.where(log_p > -jnp.inf, log_p, 0.0) + entropy[:, None]
            logits_cotangent -= for_entropy[:, None] * (jnp.exp(log_p) * surprise)
        if cap is not None:
            # d c tanh(z / c): (1 - tanh^2) dz + (tanh - z / c (1 - tanh^2)) dc
            slope = 1.0 - jnp.square(products / cap)
            cap_cotangent += jnp.sum(logits_cotangent * (products - bare * slope)) / cap
            logits_cotangent *= slope
        states_cotangent += logits_cotangent @ rows
        stacked_cotangent = stacked_cotangent.at[:, block].set(logits_cotangent.T @ states)
        return (states_cotangent, stacked_cotangent, cap_cotangent), None

    start = jnp.zeros_like(states), jnp.zeros_like(stacked), jax.tree.map(jnp.zeros_like, cap)
    (states_cotangent, stacked_cotangent, cap_cotangent), _ = jax.lax.scan(one, start, jnp.arange(blocks))
    unembedding_cotangent = stacked_cotangent.reshape(-1, unembedding.shape[1])[: unembedding.shape[0]]
    return states_cotangent, unembedding_cotangent, None, cap_cotangent


def _capped(logits: jax.Array, cap: jax.Array | None) -> jax.Array:
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _varying_alike(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Unchanged numbers; inside `shard_map`, each array now varies over every mesh axis that the other varies over.

    The gradient of a replicated array is then summed over those axes by JAX, as it is for a plain matrix product. The
    added zeros carry the axes along and are compiled away.
    """
    return first + jnp.zeros_like(jnp.sum(second)), second + jnp.zeros_like(jnp.sum(first))


def _strided(unembedding: jax.Array, blocks: int) -> jax.Array:
    """[V, D] -> [rows of a block, blocks, D], padded with zeros where V is no multiple of the blocks."""
    vocabulary, width = unembedding.shape
    size = math.ceil(vocabulary / blocks)
    return jnp.pad(unembedding, ((0, size * blocks - vocabulary), (0, 0))).reshape(size, blocks, width)


def _only_tokens(logits: jax.Array, block: jax.Array, blocks: int, vocabulary: int) -> jax.Array:
    """-inf at the padding of `_strided`, if there is any."""
    if vocabulary % blocks == 0:
        return logits
    return jnp.where((jnp.arange(logits.shape[1]) * blocks + block < vocabulary)[None], logits, -jnp.inf)


def _blocked_forward_of_primals(states, unembedding, targets, cap, blocks):
    cap = None if cap is None else cap.value
    return _blocked_forward(states.value, unembedding.value, targets.value, cap, blocks)


_blocked.defvjp(_blocked_forward_of_primals, _blocked_backward, symbolic_zeros=True)
