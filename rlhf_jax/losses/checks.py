"""What the losses refuse, and in which words; imports jax, numpy and masking only.

Shapes, dtypes and ranks are known while tracing, so these checks run once a compilation and cost nothing
after it. Ranges of hyper-parameters are checked when their value is known, be it a number, a NumPy scalar or a JAX
array; a traced one (an adaptive beta within `jit`) passes.
"""

from __future__ import annotations

import numbers

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.masking import as_float32, check_mask

__all__ = [
    "boolean",
    "check_mask",
    "floating",
    "fraction",
    "integral",
    "non_negative",
    "number_or_rows",
    "positive",
    "rows",
    "smoothing",
]


def floating(
    name: str, value: jax.typing.ArrayLike, *axes: str, like: tuple[str, jax.Array] | None = None
) -> jax.Array:
    """``value`` as a float32 array of one of the given axes.

    Args:
      name: the argument's name, for the message.
      value: what the caller gave.
      *axes: the accepted shapes in words, e.g. ``"B T"``; each word is one dimension, ``""`` a scalar.
      like: name and array of an earlier argument whose shape this one must share.

    Raises:
      TypeError: the dtype is not floating.
      ValueError: the rank is none of the accepted ones, or the shape differs from ``like``'s.
    """
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be floating, got {array.dtype}; cast it explicitly, so that nothing is truncated"
        )
    _check_shape(name, array, axes, like)
    return as_float32(array)


def integral(
    name: str, value: jax.typing.ArrayLike, *axes: str, shape: tuple[int, ...] | None = None
) -> jax.Array:
    """``value`` as an integer array (token ids), or an error that names it."""
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers (token ids), got {array.dtype}")
    _check_shape(name, array, axes, None)
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(array.shape)}")
    return array


def boolean(name: str, value: jax.typing.ArrayLike, like: tuple[str, jax.Array]) -> jax.Array:
    """``value`` as a boolean array of the shape of another argument, or an error that names it."""
    return check_mask(value, like[1].shape, name=name, like=like[0])


def number_or_rows(name: str, value: jax.typing.ArrayLike, like: tuple[str, jax.Array]) -> jax.Array:
    """``value``, a number or one a row, as a float32 array of the shape of another argument."""
    array = floating(name, float(value) if isinstance(value, int) else value, "", "B")
    if array.ndim == 1:
        _check_shape(name, array, (), like)
    return jnp.broadcast_to(array, like[1].shape)


def rows(name: str, array: jax.Array, like: tuple[str, jax.Array]) -> None:
    """Refuses an array whose first dimension is not that of another argument."""
    if array.shape[0] != like[1].shape[0]:
        raise ValueError(
            f"{name} must have one entry a row of {like[0]}, {like[1].shape[0]}, got {array.shape[0]}"
        )


def positive(name: str, value: float | jax.Array, hint: str = "") -> None:
    """Refuses a concrete number that is not above 0."""
    known = _known(name, value)
    if known is not None and not known > 0:
        raise ValueError(f"{name} must be above 0, got {known}{hint and '; '}{hint}")


def non_negative(name: str, value: float | jax.Array) -> None:
    """Refuses a concrete number below 0."""
    known = _known(name, value)
    if known is not None and not known >= 0:
        raise ValueError(f"{name} must be 0 or above, got {known}")


def fraction(name: str, value: float | jax.Array) -> None:
    """Refuses a concrete number outside [0, 1]."""
    known = _known(name, value)
    if known is not None and not 0 <= known <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {known}")


def smoothing(name: str, value: float | jax.Array) -> None:
    """Refuses a concrete share of flipped labels outside [0, 0.5): at one half the labels say nothing."""
    known = _known(name, value)
    if known is not None and not 0 <= known < 0.5:
        raise ValueError(f"{name} must be in [0, 0.5), the share of labels taken to be flipped, got {known}")


def _known(name: str, value: object) -> object | None:
    """The value of a hyper-parameter, or None while it is only traced."""
    if isinstance(value, numbers.Real | np.ndarray | jax.Array) and np.ndim(value) == 0:
        if isinstance(value, jax.core.Tracer):
            return None
        # As NumPy: a comparison of JAX arrays would be traced within `jit`, even of constants.
        return np.asarray(value) if isinstance(value, jax.Array) else value
    raise TypeError(f"{name} must be a number or a scalar array, got {value!r}")


def _check_shape(
    name: str, array: jax.Array, axes: tuple[str, ...], like: tuple[str, jax.Array] | None
) -> None:
    if axes and array.ndim not in [len(words.split()) for words in axes]:
        wanted = " or ".join(f"[{', '.join(words.split())}]" for words in axes)
        raise ValueError(f"{name} must have shape {wanted}, got {list(array.shape)} (rank {array.ndim})")
    if like is not None and array.shape != like[1].shape:
        raise ValueError(
            f"{name} must have the shape of {like[0]}, {list(like[1].shape)}, got {list(array.shape)}"
        )
