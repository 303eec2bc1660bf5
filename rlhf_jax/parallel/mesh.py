"""A device mesh, where batches and parameters live on it, and a step compiled for it. Imports errors only.

Two paths run the very same step. ``jit``: the batch is sharded over the mesh's ``data`` axis, parameters are
replicated, and XLA inserts the reductions. ``pmap``: every device holds a replica and its rows, and the step's
own reducer sums totals and weights over the axis named ``data``. Both give the same update to float tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax.errors import InputError

DATA_AXIS = "data"
Parallelism = Literal["jit", "pmap"]


def data_mesh(num_devices: int | None = None) -> jax.sharding.Mesh:
    """A one-axis mesh over the first ``num_devices`` devices (default: all)."""
    devices = jax.devices()[:num_devices]
    # make_mesh defaults to Explicit axes, where a sharded Linen embedding raises.
    return jax.make_mesh((len(devices),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Axis 0 (rows) is split over the data axis."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def check_rows(mesh: jax.sharding.Mesh, rows: int, name: str) -> None:
    """Raises InputError unless ``rows`` rows (the value of option ``name``) divide over the mesh."""
    devices = mesh.shape[DATA_AXIS]
    if rows % devices:
        raise InputError(
            f"{name} is {rows}, which does not divide over {devices} devices; use a multiple of {devices}"
        )


def put_rows(mesh: jax.sharding.Mesh, batch: Any) -> Any:
    """Places a pytree of [B, ...] arrays, rows split over the data axis."""
    return jax.device_put(batch, by_rows(mesh))


def compile_step(
    make_step: Callable[[str | None], Callable[[Any, Any, Any], tuple[Any, Any]]],
    mesh: jax.sharding.Mesh,
    parallelism: Parallelism,
) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """Compiles ``step(state, frozen, batch) -> (state, metrics)`` for the mesh; ``jit`` donates the state.

    Args:
      make_step: builds the pure step; its argument is the mapped axis name under ``pmap``, None under ``jit``.
      mesh: see ``data_mesh``.
      parallelism: which path.
    """
    if parallelism == "jit":
        whole, rows = replicated(mesh), by_rows(mesh)
        compiled = jax.jit(
            make_step(None), in_shardings=(whole, whole, rows), out_shardings=(whole, whole), donate_argnums=0
        )
        return lambda state, frozen, batch: compiled(state, frozen, put_rows(mesh, batch))
    if parallelism != "pmap":
        raise InputError(f"--parallelism={parallelism!r}; use 'jit' or 'pmap'")
    devices = list(mesh.devices.flat)
    mapped = jax.pmap(
        make_step(DATA_AXIS), axis_name=DATA_AXIS, in_axes=(None, None, 0), out_axes=None, devices=devices
    )

    def step(state, frozen, batch):
        split = jax.tree.map(lambda x: np.asarray(x).reshape(len(devices), -1, *x.shape[1:]), batch)
        return mapped(state, frozen, split)

    return step
