"""The one train step: from an objective and an optimiser to a pure update. Imports masking and metrics.

An objective returns *terms*, each an unreduced total with the weight to divide it by. The loss is the sum over terms
of total / weight, where total and weight are summed over micro-batches and devices *before* the division; the update
is therefore the same however the batch was split. To make that true of the gradient as well, the weights (functions
of masks alone) are summed in a first pass, from which XLA removes everything else, and held constant in the second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.masking import WeightedSum
from rlhf_jax.metrics import Metrics, merge, merge_over_axis

Params = Any
Batch = Any
Terms = Mapping[str, WeightedSum]
# (params, frozen, batch) -> (terms of the loss, metrics). ``frozen`` holds what is not trained, e.g. a reference.
Objective = Callable[[Params, Any, Batch], tuple[Terms, Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything an update depends on.

    params, opt_state: pytrees. step: [] int32, updates attempted. key: the stage's typed PRNG key, never consumed:
    draws use ``fold_in``. skipped: [] int32, consecutive updates left out because loss or gradient was not finite.
    """

    params: Params
    opt_state: Any
    step: jax.Array
    key: jax.Array
    skipped: jax.Array


def init_train_state(params: Params, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """A state at step 0. ``key`` is a typed key (``jax.random.key``) that belongs to this stage alone."""
    return TrainState(
        params=params,
        opt_state=optimizer.init(params),
        step=jnp.zeros((), jnp.int32),
        key=key,
        skipped=jnp.zeros((), jnp.int32),
    )


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    num_microbatches: int = 1,
    axis_name: str | None = None,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict]]:
    """Builds ``step(state, frozen, batch) -> (state, metrics)``; pure, to be wrapped in ``jit`` or ``pmap``.

    Args:
      objective: see ``Objective``.
      optimizer: an Optax chain.
      num_microbatches: the batch is split along axis 0 into this many equal parts, visited in turn.
      axis_name: the mapped device axis under ``pmap`` or ``shard_map``; None under ``jit``.

    Raises:
      ValueError: (at trace time) if the batch does not divide into the micro-batches.
    """

    def loss_and_metrics(params, frozen, batch, weights):
        terms, metrics = objective(params, frozen, batch)
        losses = {name: _safe_divide(term.total, weights[name]) for name, term in terms.items()}
        metrics = {
            f"loss/{name}": WeightedSum(term.total, term.weight) for name, term in terms.items()
        } | dict(metrics)
        return sum(losses.values()), metrics

    def train_step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, dict]:
        micro = _split(batch, num_microbatches)

        def weights_of(part):
            terms, _ = objective(state.params, frozen, part)
            return {name: jnp.asarray(term.weight, jnp.float32) for name, term in terms.items()}

        weights = _sum_over(weights_of, micro, num_microbatches)
        if axis_name is not None:
            weights = jax.lax.psum(weights, axis_name)

        def grads_of(part):
            gradient = jax.value_and_grad(loss_and_metrics, has_aux=True)
            (loss, metrics), grads = gradient(state.params, frozen, part, weights)
            return {"loss": loss, "grads": grads}, metrics

        (sums, metrics) = _sum_over(grads_of, micro, num_microbatches)
        if axis_name is not None:
            sums = jax.lax.psum(sums, axis_name)
            metrics = merge_over_axis(metrics, axis_name)
        return _apply_update(state, optimizer, sums["loss"], sums["grads"], metrics)

    return train_step


def _apply_update(state, optimizer, loss, grads, metrics):
    """One optimiser update, or none where the loss or the gradient is not finite."""
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)  # noqa: E731
    new_state = TrainState(
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        step=state.step + 1,
        key=state.key,
        skipped=jnp.where(finite, 0, state.skipped + 1).astype(jnp.int32),
    )
    one = jnp.ones((), jnp.float32)
    extra = {
        "loss": WeightedSum(loss, one),
        "grad_norm": WeightedSum(grad_norm, one),
        "skipped_updates": WeightedSum(1.0 - finite.astype(jnp.float32), one),
    }
    return new_state, dict(metrics) | extra


def _safe_divide(total, weight):
    """total / weight, and 0 with zero gradient where the weight is 0 (an empty batch)."""
    return jnp.where(weight > 0, total, 0.0) / jnp.where(weight > 0, weight, 1.0)


def _split(batch, parts):
    """Each leaf [B, ...] becomes [parts, B / parts, ...]."""

    def split(x):
        if x.shape[0] % parts:
            raise ValueError(f"a batch of {x.shape[0]} rows does not divide into num_microbatches={parts}")
        return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])

    return jax.tree.map(split, batch)


def _sum_over(function, micro, parts):
    """Sums ``function`` over micro-batches; a metrics dict as second output merges by its own rule."""
    first = jax.tree.map(lambda x: x[0], micro)
    if parts == 1:
        return function(first)

    def add(total, part):
        out = function(part)
        if isinstance(out, tuple):
            sums, metrics = out
            return (jax.tree.map(jnp.add, total[0], sums), merge(total[1], metrics)), None
        return jax.tree.map(jnp.add, total, out), None

    rest = jax.tree.map(lambda x: x[1:], micro)
    total, _ = jax.lax.scan(add, function(first), rest)
    return total
