"""Low-rank adapters in the place of whole models, for any stage: one frozen base, whoever is trained. Imports models.

What a stage trains is a tree of roles, each ``{"decoder": ..., "head": ...}``. With adapters the same tree holds
``{"adapter": ..., "head": ...}`` instead, and ``attach`` gives back, from it and from the base, the parameters that
losses and samplers take; the kernels in them are the base's own arrays. So PPO's policy, value model, reference and
reward model are four roles of one base, and optimiser and checkpoints are as large as the adapters.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from rlhf_jax.models import lora
from rlhf_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Whether a stage trains adapters (Hu et al. 2022) instead of whole kernels.

    rank: of the additions; 0: everything is trained. alpha: additions are multiplied by alpha / rank. targets: of
    query, key, value, output, gate, up, down.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ("query", "value")

    def __post_init__(self) -> None:
        if self.rank:
            lora.LoraConfig(
                rank=self.rank, alpha=self.alpha, targets=self.targets
            )  # which says what is wrong

    @property
    def settings(self) -> lora.LoraConfig | None:
        """As models take them; None: everything is trained."""
        if not self.rank:
            return None
        return lora.LoraConfig(rank=self.rank, alpha=self.alpha, targets=self.targets)


def detach(config: ModelConfig, roles: Mapping[str, Any], settings: lora.LoraConfig, key: jax.Array) -> Any:
    """What is trained in the place of ``roles``: a fresh adapter, which adds nothing, for each that has none.

    Args:
      config: of the base.
      roles: ``{"decoder": ..., ...}``, or a mapping of such; one that has an ``adapter`` already stays as it is.
      settings: size and place of the adapters.
      key: typed key.

    Raises:
      InputError: a target is no kernel of the model.
    """
    if "adapter" in roles:
        return dict(roles)
    if "decoder" in roles:
        rest = {name: value for name, value in roles.items() if name != "decoder"}
        return {"adapter": lora.init_lora(config, settings, key), **rest}
    return {
        name: detach(config, role, settings, jax.random.fold_in(key, number))
        for number, (name, role) in enumerate(sorted(roles.items()))
    }


def attach(trained: Mapping[str, Any], base: Any, settings: lora.LoraConfig) -> Any:
    """Whole parameters of every role, from what is trained and the base's ``{"decoder": ...}``; copies nothing."""
    if "adapter" not in trained:
        return {name: attach(role, base, settings) for name, role in trained.items()}
    rest = {name: value for name, value in trained.items() if name != "adapter"}
    return {**lora.with_adapter({"decoder": base["decoder"]}, trained["adapter"], settings), **rest}


def merge(trained: Mapping[str, Any], base: Any, settings: lora.LoraConfig) -> Any:
    """Plain parameters of one role, with the additions in the kernels: a second copy of those it touches."""
    rest = {name: value for name, value in trained.items() if name != "adapter"}
    merge_kernels = jax.jit(functools.partial(lora.merge_adapter, lora=settings))
    return {**merge_kernels({"decoder": base["decoder"]}, trained["adapter"]), **rest}


def adapted(function: Callable, settings: lora.LoraConfig) -> Callable:
    """``function(params, frozen, ...)`` as one of (what is trained, {"base": ..., "own": frozen}, ...)."""

    def call(trained: Any, frozen: Mapping[str, Any], *rest: Any) -> Any:
        return function(attach(trained, frozen["base"], settings), frozen["own"], *rest)

    return call


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """What a stage made. params: whole parameters. adapter: with adapters, ``{"adapter", ...}`` beside the base."""

    params: Any
    adapter: Any = None


def result(trained: Any, base: Any, settings: lora.LoraConfig | None) -> Trained:
    """One role of what was trained, on ``base`` where it is an adapter."""
    if settings is None:
        return Trained(params=trained)
    return Trained(params=attach(trained, base, settings), adapter=trained)
