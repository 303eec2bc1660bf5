"""Which axis of which array is split over which axis of the mesh: one table, ``RULES``. Imports models and errors only.

Models name the axes of their parameters and activations (``decoder.logical_axes``, ``heads.scalar_head_axes``); the
table maps a name to axes of the mesh. What mirrors parameters (Adam's moments) is laid out as they are. A KV cache has
no entry: it follows from its rows and from the heads of the kernels that fill it.

Where the size does not divide, an axis stays whole on every device, and ``whole_axes`` says which: nothing is refused
that runs, and nothing is silently slow. A query, key or value kernel is split between heads and never within one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.models import decoder, heads, lora
from rlhf_jax.models.config import ModelConfig

# Logical axis -> axes of the mesh that split it. Parameters: along their width over fsdp (Rajbhandari et al. 2020,
# ZeRO stage 3), along heads, hidden units and vocabulary over tensor (Shoeybi et al. 2019). Activations: rows.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": (),
    "activation_embed": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "head_dim": (),
    "position": (),
    "layers": (),
    "lora_rank": (),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeAxis:
    """An axis that the table splits and that stays whole, since its size does not divide.

    parameters: the paths of those it belongs to. axis: its logical name. size: how many it has (heads, not columns,
    where it is made of heads). parts: over how many devices it was to be split.
    """

    parameters: tuple[str, ...]
    axis: str
    size: int
    parts: int

    def __str__(self) -> str:
        return (
            f"{', '.join(self.parameters)}: {self.axis} has {self.size}, which does not divide by {self.parts}; "
            "whole on every device"
        )


@contextlib.contextmanager
def scope(mesh: Mesh) -> Iterator[None]:
    """The mesh and the table in scope, for constraints on activations inside models."""
    rules = [(name, axes or None) for name, axes in RULES.items()]
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def within(mesh: Mesh, function: Callable) -> Callable:
    """``function``, always called (and so traced, where it is compiled) in the mesh's ``scope``."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with scope(mesh):
            return function(*args)

    return call


def parameter_sharding(mesh: Mesh, config: ModelConfig, params: Any) -> Any:
    """Where each parameter lives: a tree like ``params`` of ``NamedSharding``.

    Args:
      mesh: has the axes of the table.
      config: of the model.
      params: arrays or their shapes: ``decoder`` or ``adapter`` and, where there is one, ``head``; or a
        tree of such. Axes in front of those that the
        model names (the members of an ensemble) stay whole.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(mesh, config, path, leaf)[0]), params
    )


def whole_axes(mesh: Mesh, config: ModelConfig, params: Any) -> list[WholeAxis]:
    """What ``parameter_sharding`` leaves whole though the table splits it."""
    found: dict[tuple[str, int, int], list[str]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        for reason in _spec(mesh, config, path, leaf)[1]:
            found.setdefault(reason, []).append(_name(path))
    return [
        WholeAxis(parameters=tuple(names), axis=axis, size=size, parts=parts)
        for (axis, size, parts), names in found.items()
    ]


def mirrored(mesh: Mesh, tree: Any, params: Any, sharding: Any) -> Any:
    """Where each array of a state lives: as the parameter whose path its own ends with, whole where there is none.

    Args:
      mesh: for what is whole.
      tree: arrays or their shapes, of a train state or anything around one; the moments of an Optax optimiser lie
        under the paths of the parameters.
      params: the trained parameters, arrays or shapes.
      sharding: theirs, a tree like ``params``.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    places = jax.tree.leaves(sharding)
    table = {path: (leaf.shape, place) for (path, leaf), place in zip(leaves, places, strict=True)}

    def place(path: tuple, leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            shape, where = table.get(path[start:], (None, None))
            if shape == leaf.shape:
                return where
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, tree)


def _spec(mesh: Mesh, config: ModelConfig, path: tuple, leaf: Any) -> tuple[PartitionSpec, list[tuple]]:
    """Axes of the mesh for each axis of a parameter; and (logical axis, size, parts) of those that do not divide."""
    names = _logical_names(config, path)
    names = (None,) * (len(leaf.shape) - len(names)) + names
    spec, whole = [], []
    for name, size in zip(names, leaf.shape, strict=True):
        axes = () if name is None else RULES[name]
        parts = math.prod(mesh.shape[axis] for axis in axes)
        # Kernels hold heads side by side: [D, heads * head_dim].
        size = {"heads": config.num_heads, "kv_heads": config.num_kv_heads}.get(name, size)
        if size % parts:
            whole.append((name, size, parts))
        spec.append(axes if parts > 1 and size % parts == 0 else None)
    return PartitionSpec(*spec), whole


def _logical_names(config: ModelConfig, path: tuple) -> tuple[str, ...]:
    """The names of a parameter's axes, by its path from ``decoder``, ``adapter`` or ``head`` on."""
    keys = [key.key for key in path]
    start = next(index for index, key in enumerate(keys) if key in ("decoder", "adapter", "head"))
    node: Any = _axes(config)
    for key in keys[start:]:
        node = node[key]
    return tuple(node)


@functools.lru_cache(maxsize=8)
def _axes(config: ModelConfig) -> Any:
    targets = tuple(name for name in lora.TARGETS if name in decoder.layer_axes(config))
    adapter = lora.adapter_axes(config, lora.LoraConfig(rank=1, alpha=1.0, targets=targets))
    return {**decoder.logical_axes(config), "adapter": adapter, "head": heads.scalar_head_axes()}


def _name(path: tuple) -> str:
    return "/".join(str(key.key) for key in path)
