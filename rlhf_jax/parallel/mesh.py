"""A device mesh, where batches and parameters live on it, and a step compiled for it. Imports errors, sharding, hosts.

A mesh has three axes. ``data``: rows, with parameters whole. ``fsdp``: rows too, and parameters cut along their width,
gathered layer by layer where they are used. ``tensor``: heads, the hidden units of the MLP and the vocabulary.

Two paths run the very same step. ``jit``: everything is laid out by ``parallel.sharding``, and XLA inserts the
communication. ``pmap``: every device holds a replica and its rows, and the step's own reducer sums totals and weights
over the axis named ``data``. All give the same update to float tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax.errors import InputError
from rlhf_jax.parallel import hosts, sharding

DATA_AXIS = "data"
AXES = (DATA_AXIS, "fsdp", "tensor")
Parallelism = Literal["jit", "pmap"]


def data_mesh(num_devices: int | None = None) -> jax.sharding.Mesh:
    """A mesh of the first ``num_devices`` devices (default: all), every one of them on the data axis."""
    devices = jax.devices()[:num_devices]
    return mesh_of({DATA_AXIS: len(devices)}, devices)


def make_mesh(text: str, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh that ``--mesh`` describes, as in "data:2,fsdp:4"; an axis that is not named has size 1.

    Args:
      text: sizes of axes; empty: all devices on the data axis.
      devices: those to use, all of them (default: every device there is).

    Raises:
      InputError: an axis that is none, a size that is no whole number above 0, or another number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if not text:
        return mesh_of({DATA_AXIS: len(devices)}, devices)
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition(":"))
        if name not in AXES:
            raise InputError(
                f"--mesh={text}: there is no axis {name!r}; name data, fsdp or tensor with a size, as in data:2,fsdp:4"
            )
        if name in sizes:
            raise InputError(f"--mesh={text}: {name} is there twice; give each axis once")
        if not size.isdecimal() or int(size) < 1:
            raise InputError(
                f"--mesh={text}: the size of {name} is {size!r}; give a whole number above 0, as in {name}:4"
            )
        sizes[name] = int(size)
    if math.prod(sizes.values()) != len(devices):
        raise InputError(
            f"--mesh={text} is for {math.prod(sizes.values())} devices and there are {len(devices)}; "
            f"give sizes whose product is {len(devices)}"
        )
    return mesh_of(sizes, devices)


def mesh_of(sizes: dict[str, int], devices: Sequence[Any]) -> jax.sharding.Mesh:
    """The mesh with these sizes of axes, 1 where there is none."""
    shape = tuple(sizes.get(name, 1) for name in AXES)
    # make_mesh defaults to Explicit axes, where a sharded Linen embedding raises.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Axis 0 (rows) is split over the axes of the mesh that split rows."""
    return NamedSharding(mesh, PartitionSpec(sharding.RULES["batch"]))


def check_rows(mesh: jax.sharding.Mesh, rows: int, name: str) -> None:
    """Raises InputError unless ``rows`` rows (the value of option ``name``) divide over the mesh."""
    parts = math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])
    if rows % parts:
        raise InputError(
            f"{name} is {rows}, which does not divide over {parts} devices; use a multiple of {parts}"
        )


def check_parallelism(mesh: jax.sharding.Mesh, parallelism: Parallelism) -> None:
    """Raises InputError for a path that is none, or ``pmap`` where parameters are split or processes several."""
    if parallelism not in ("jit", "pmap"):
        raise InputError(f"--parallelism={parallelism!r}; use 'jit' or 'pmap'")
    if parallelism == "pmap" and jax.process_count() > 1:
        raise InputError(
            f"--parallelism=pmap runs in one process, and this job has {jax.process_count()}; use jit"
        )
    if parallelism == "pmap" and mesh.shape[DATA_AXIS] != mesh.size:
        raise InputError(
            f"--parallelism=pmap holds whole parameters on every device, and the mesh splits them "
            f"({', '.join(f'{name}:{size}' for name, size in mesh.shape.items())}); use jit, or leave --mesh out"
        )


def put(tree: Any, places: Any) -> Any:
    """Places arrays, each process having all of those that are not placed yet.

    Args:
      tree: arrays, typed keys among them.
      places: a tree like it of shardings.
    """

    def place(x: Any, where: jax.sharding.Sharding) -> Any:
        # device_put takes no typed key to devices of other processes.
        if not where.is_fully_addressable and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.jit(lambda key: key, out_shardings=where)(x)
        return jax.device_put(x, where)

    return jax.tree.map(place, tree, places)


def put_rows(mesh: jax.sharding.Mesh, batch: Any) -> Any:
    """Places a pytree of [B, ...] arrays that every process has, rows split over the devices that split rows."""
    where = by_rows(mesh)
    if where.is_fully_addressable:
        return jax.device_put(batch, where)

    def place(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, where)
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])

    return jax.tree.map(place, batch)


def put_own_rows(mesh: jax.sharding.Mesh, batch: Any) -> Any:
    """As `put_rows`, where each process has [B / processes, ...] NumPy arrays; those of the first come first."""
    where = by_rows(mesh)
    if where.is_fully_addressable:
        return jax.device_put(batch, where)
    own = jax.tree.leaves(batch)[0].shape[0]
    places = where.devices_indices_map((own * jax.process_count(),))
    if holds_what_it_reads({device: index[0] for device, index in places.items()}, own):
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, x), batch)
    # Devices of this process hold rows that another one has read, as where ``tensor`` spans processes.
    return put_rows(mesh, hosts.gather_rows(batch))


def holds_what_it_reads(places: Mapping[Any, slice], own: int) -> bool:
    """Whether every process's devices hold just the ``own`` rows that it has read; the same answer on all.

    Args:
      places: of every device of the mesh, the rows of the whole batch that it holds.
      own: rows that each process reads; those of the first process come first.
    """
    whole = own * (1 + max(device.process_index for device in places))
    held: dict[int, set[int]] = {}
    for device, rows in places.items():
        held.setdefault(device.process_index, set()).update(range(*rows.indices(whole)))
    return all(rows == set(range(own * number, own * (number + 1))) for number, rows in held.items())


def jit_step(
    make_step: Callable[[str | None], Callable[[Any, Any, Any], tuple[Any, Any]]],
    mesh: jax.sharding.Mesh,
    state_sharding: Any = None,
) -> Any:
    """The jitted step of ``compile_step``, as JAX gives it; trace it in ``sharding.scope``."""
    whole, rows = replicated(mesh), by_rows(mesh)
    state_sharding = whole if state_sharding is None else state_sharding
    return jax.jit(
        make_step(None),
        in_shardings=(state_sharding, None, rows),
        out_shardings=(state_sharding, whole),
        donate_argnums=0,
    )


def compile_step(
    make_step: Callable[[str | None], Callable[[Any, Any, Any], tuple[Any, Any]]],
    mesh: jax.sharding.Mesh,
    parallelism: Parallelism,
    state_sharding: Any = None,
) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """Compiles ``step(state, frozen, batch) -> (state, metrics)`` for the mesh; the state is donated.

    Args:
      make_step: builds the pure step; its argument is the mapped axis name under ``pmap``, None under ``jit``.
      mesh: see ``make_mesh``.
      parallelism: which path.
      state_sharding: where each array of the state lives before and after the step (see ``sharding.mirrored``); None:
        whole on every device. ``frozen`` is read where it lies.

    Raises:
      InputError: see ``check_parallelism``.
    """
    check_parallelism(mesh, parallelism)
    if parallelism == "jit":
        compiled = sharding.within(mesh, jit_step(make_step, mesh, state_sharding))
        return lambda state, frozen, batch: compiled(state, frozen, put_rows(mesh, batch))
    devices = list(mesh.devices.flat)
    mapped = jax.pmap(
        make_step(DATA_AXIS),
        axis_name=DATA_AXIS,
        in_axes=(None, None, 0),
        out_axes=None,
        devices=devices,
        donate_argnums=0,
    )

    def step(state, frozen, batch):
        split = jax.tree.map(lambda x: np.asarray(x).reshape(len(devices), -1, *x.shape[1:]), batch)
        return mapped(state, frozen, split)

    return step
