"""Masked sums, means and whitening, and the named reductions of a loss; imports jax only.

Every loss of this library comes back unreduced. One of the reductions here turns it into a `WeightedSum`, a
total and the weight to divide it by. Totals and weights add up over micro-batches, devices and hosts, and the
division happens once, in `WeightedSum.mean`; so an update does not depend on how its batch was split.

Masked-out entries are replaced before any arithmetic, never multiplied by zero: NaN and infinity under a mask
reach neither a value nor a gradient. A row without a single unmasked entry counts as absent: it adds nothing
to a total and nothing to a weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

__all__ = [
    "WHITENING_EPSILON",
    "WeightedSum",
    "as_float32",
    "check_mask",
    "elementwise",
    "fixed_length_mean",
    "masked_mean",
    "masked_sum",
    "masked_whiten",
    "sequence_mean_of_token_means",
    "sequence_mean_of_token_sums",
    "token_mean",
]

WHITENING_EPSILON = 1e-8
"""Added to the variance before its inverse square root, as in Ziegler et al.'s code."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightedSum:
    """A total and the weight it is to be divided by; both add up, the division comes last.

    total: [] float32, the sum of what was measured.
    weight: [] float32, how many units (tokens, sequences) the total is the sum of.

    >>> first, second = (WeightedSum(jnp.float32(x), jnp.float32(4.0 - x)) for x in (3.0, 1.0))
    >>> float((first + second).mean())
    1.0
    """

    total: jax.Array
    weight: jax.Array

    def __add__(self, other: WeightedSum) -> WeightedSum:
        return WeightedSum(self.total + other.total, self.weight + other.weight)

    def sum_over(self, axis_name: str | Sequence[str]) -> WeightedSum:
        """Adds up over the devices of a mapped axis (inside `pmap` or `shard_map`)."""
        return WeightedSum(*jax.lax.psum((self.total, self.weight), axis_name))

    def mean(self) -> jax.Array:
        """total / weight, and 0 (with zero gradient) when the weight is 0."""
        some = self.weight > 0
        return jnp.where(some, self.total, 0.0) / jnp.where(some, self.weight, 1.0)


def as_float32(x: jax.Array) -> jax.Array:
    """Raises half precision to float32; float64, which exists only with x64 enabled, is left alone."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_mask(
    mask: jax.typing.ArrayLike, shape: tuple[int, ...], *, name: str = "mask", like: str = "x"
) -> jax.Array:
    """The mask as an array, or an error that names it.

    Raises:
      TypeError: ``mask`` is not boolean.
      ValueError: ``mask`` has another shape than the array it masks.
    """
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"{name} must be boolean (True where {like} counts), got {mask.dtype}; make it from lengths"
        )
    if mask.shape != shape:
        raise ValueError(f"{name} must have the shape of {like}, {list(shape)}, got {list(mask.shape)}")
    return mask


def elementwise(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Applies an elementwise function such that non-finite entries poison neither their neighbours nor
    gradients.

    Where any input is NaN or infinite the value is NaN, loud if it is ever read, and the gradient is exactly
    0. A plain ``function(*arrays)`` would answer a zero cotangent with 0 * NaN = NaN there, which no mask
    applied later can undo.

    Args:
      function: elementwise, finite at zero.
      *arrays: float arrays of one shape.
    """
    finite = jnp.isfinite(arrays[0])
    for array in arrays[1:]:
        finite &= jnp.isfinite(array)
    return jnp.where(finite, function(*(jnp.where(finite, array, 0.0) for array in arrays)), jnp.nan)


def masked_sum(x: jax.typing.ArrayLike, mask: jax.typing.ArrayLike, *, axis: int | None = None) -> jax.Array:
    """Sum of the unmasked entries, in float32.

    Args:
      x: [...] float.
      mask: [...] bool, the shape of ``x``, True where an entry counts.
      axis: the axis to sum over; all of them when None.

    Returns:
      [] or [...] float32; 0 where nothing counts.

    Raises:
      TypeError: ``x`` is not floating or ``mask`` not boolean.
      ValueError: the shapes differ.

    >>> float(masked_sum(jnp.array([1.0, 2.0, jnp.nan]), jnp.array([True, True, False])))
    3.0
    """
    x, mask = _checked(x, mask)
    return jnp.sum(jnp.where(mask, x, 0.0), axis=axis)


def masked_mean(x: jax.typing.ArrayLike, mask: jax.typing.ArrayLike, *, axis: int | None = None) -> jax.Array:
    """Mean of the unmasked entries, in float32; 0 where there are none.

    Args:
      x: [...] float.
      mask: [...] bool, the shape of ``x``, True where an entry counts.
      axis: the axis to average over; all of them when None.

    Raises:
      TypeError: ``x`` is not floating or ``mask`` not boolean.
      ValueError: the shapes differ.

    >>> float(masked_mean(jnp.array([1.0, 2.0, 9.0]), jnp.array([True, True, False])))
    1.5
    """
    x, mask = _checked(x, mask)
    total = masked_sum(x, mask, axis=axis)
    return total / jnp.maximum(jnp.sum(mask, axis=axis), 1).astype(total.dtype)


def masked_whiten(
    x: jax.typing.ArrayLike,
    mask: jax.typing.ArrayLike,
    *,
    shift_mean: bool = True,
    axis_name: str | Sequence[str] | None = None,
) -> jax.Array:
    """Scales the unmasked entries to variance 1 and, with ``shift_mean``, to mean 0.

    (x - mean) / sqrt(var + 1e-8), with the population variance (divided by n), as in Ziegler et al. (2019)'s
    code. The statistics are those of the whole argument: whiten the global batch once, before cutting
    micro-batches.

    Args:
      x: [...] float.
      mask: [...] bool, the shape of ``x``, True where an entry counts.
      shift_mean: False keeps the mean where it was (for rewards, whose mean carries meaning).
      axis_name: inside `pmap` or `shard_map`, the mapped axis whose devices share the statistics.

    Returns:
      [...] float32, 0 where masked out.

    Raises:
      TypeError: ``x`` is not floating or ``mask`` not boolean.
      ValueError: the shapes differ.

    >>> masked_whiten(jnp.array([2.0, 4.0, 7.0]), jnp.array([True, True, False]))
    Array([-1.,  1.,  0.], dtype=float32)
    """
    x, mask = _checked(x, mask)

    def mean_of(values: jax.Array) -> jax.Array:
        share = WeightedSum(jnp.sum(jnp.where(mask, values, 0.0)), jnp.sum(mask).astype(values.dtype))
        return (share if axis_name is None else share.sum_over(axis_name)).mean()

    x = jnp.where(mask, x, 0.0)
    mean = mean_of(x)
    centred = jnp.where(mask, x - mean, 0.0)
    whitened = centred * jax.lax.rsqrt(mean_of(jnp.square(centred)) + WHITENING_EPSILON)
    return whitened if shift_mean else jnp.where(mask, whitened + mean, 0.0)


def token_mean(x: jax.typing.ArrayLike, mask: jax.typing.ArrayLike) -> WeightedSum:
    """Every token of the batch weighs the same: sum over tokens / number of tokens (SFT, PPO, DAPO).

    Args:
      x: [B, T] float, one loss a token.
      mask: [B, T] bool, True where a token counts.

    Returns:
      WeightedSum of weight "unmasked tokens".

    Raises:
      TypeError: ``x`` is not floating or ``mask`` not boolean.
      ValueError: ``x`` is not of rank 2, or the shapes differ.

    >>> loss, mask = jnp.array([[1.0, 2.0], [6.0, 0.0]]), jnp.array([[True, True], [True, False]])
    >>> float(token_mean(loss, mask).mean())
    3.0
    """
    x, mask = _checked(x, mask, rank=2)
    return WeightedSum(masked_sum(x, mask), jnp.sum(mask).astype(x.dtype))


def sequence_mean_of_token_means(x: jax.typing.ArrayLike, mask: jax.typing.ArrayLike) -> WeightedSum:
    """Every sequence weighs the same, and so does every token within it (GRPO, Shao et al. 2024, eq. 3).

    Args:
      x: [B, T] float, one loss a token.
      mask: [B, T] bool, True where a token counts.

    Returns:
      WeightedSum of weight "sequences with at least one unmasked token".

    Raises:
      TypeError: ``x`` is not floating or ``mask`` not boolean.
      ValueError: ``x`` is not of rank 2, or the shapes differ.

    >>> loss, mask = jnp.array([[1.0, 2.0], [6.0, 0.0]]), jnp.array([[True, True], [True, False]])
    >>> float(sequence_mean_of_token_means(loss, mask).mean())
    3.75
    """
    x, mask = _checked(x, mask, rank=2)
    return WeightedSum(jnp.sum(masked_mean(x, mask, axis=1)), _present_rows(mask, x.dtype))


def sequence_mean_of_token_sums(x: jax.typing.ArrayLike, mask: jax.typing.ArrayLike) -> WeightedSum:
    """Sum over the tokens of a sequence, mean over sequences (policy gradient of a whole response; RLOO).

    Args:
      x: [B, T] float, one loss a token.
      mask: [B, T] bool, True where a token counts.

    Returns:
      WeightedSum of weight "sequences with at least one unmasked token".

    Raises:
      TypeError: ``x`` is not floating or ``mask`` not boolean.
      ValueError: ``x`` is not of rank 2, or the shapes differ.

    >>> loss, mask = jnp.array([[1.0, 2.0], [6.0, 0.0]]), jnp.array([[True, True], [True, False]])
    >>> float(sequence_mean_of_token_sums(loss, mask).mean())
    4.5
    """
    x, mask = _checked(x, mask, rank=2)
    return WeightedSum(masked_sum(x, mask), _present_rows(mask, x.dtype))


def fixed_length_mean(x: jax.typing.ArrayLike, mask: jax.typing.ArrayLike, *, length: int) -> WeightedSum:
    """Sum over tokens / (sequences * a constant length): no length bias (Dr. GRPO, Liu et al. 2025).

    Args:
      x: [B, T] float, one loss a token.
      mask: [B, T] bool, True where a token counts.
      length: tokens, the constant in the denominator; usually the longest response that may be sampled.

    Returns:
      WeightedSum of weight "sequences with at least one unmasked token, times length".

    Raises:
      TypeError: ``x`` is not floating or ``mask`` not boolean.
      ValueError: ``x`` is not of rank 2, the shapes differ, or ``length`` is not positive.

    >>> loss, mask = jnp.array([[1.0, 2.0], [6.0, 0.0]]), jnp.array([[True, True], [True, False]])
    >>> float(fixed_length_mean(loss, mask, length=3).mean())
    1.5
    """
    if not isinstance(length, jax.Array) and not length > 0:
        raise ValueError(f"length must be a positive number of tokens, got {length!r}")
    sums = sequence_mean_of_token_sums(x, mask)
    return WeightedSum(sums.total, sums.weight * length)


def _present_rows(mask: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.sum(jnp.any(mask, axis=1)).astype(dtype)


def _checked(
    x: jax.typing.ArrayLike, mask: jax.typing.ArrayLike, *, rank: int | None = None
) -> tuple[jax.Array, jax.Array]:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating, got {x.dtype}; integers would be truncated silently")
    if rank is not None and x.ndim != rank:
        raise ValueError(f"x must have rank {rank} ([B, T]), got shape {list(x.shape)}")
    return as_float32(x), check_mask(mask, x.shape)
