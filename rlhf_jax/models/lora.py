"""Low-rank adapters beside frozen parameters (Hu et al. 2022), and PEFT's files; imports errors and models only.

An adapter is a tree of its own: ``{"query": {"in": [L, I, r], "out": [L, r, O]}, ...}``, float32, for kernels
[L, I, O]. ``with_adapter`` gives parameters that every function of this package takes where it takes parameters; the
kernels in them are the base's own arrays, and the forward pass adds (x @ in) @ out. So one base serves as many roles
as there are adapters: differentiate with respect to the adapter, and hand the base over as a constant.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.models import tensor_files
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.decoder import Params, layer_axes
from rlhf_jax.models.families import FAMILIES, Family, Stored, config_to_huggingface
from rlhf_jax.models.huggingface import join_thirds, split_thirds

Adapter = dict[str, dict[str, jax.Array]]

TARGETS = ("query", "key", "value", "output", "gate", "up", "down")
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SCORE = "base_model.model.score.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which kernels have an addition, and of what size.

    rank: r, columns of ``in``. alpha: additions are multiplied by alpha / rank. targets: of query, key, value, output,
    gate, up, down.

    Raises:
        InputError: a field is out of range; the message names it.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("query", "value")

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise InputError(f"lora field rank is {self.rank!r}: give a whole number of at least 1")
        if not isinstance(self.alpha, int | float) or not 0 < self.alpha < float("inf"):
            raise InputError(f"lora field alpha is {self.alpha!r}: give a number above 0")
        if not self.targets or set(self.targets) - set(TARGETS) or len(set(self.targets)) < len(self.targets):
            raise InputError(
                f"lora field targets is {self.targets!r}: give different ones of {', '.join(TARGETS)}"
            )

    @property
    def scale(self) -> float:
        """What an addition is multiplied by."""
        return self.alpha / self.rank


def init_lora(config: ModelConfig, lora: LoraConfig, key: jax.Array) -> Adapter:
    """A fresh adapter, which adds nothing: ``in`` is uniform within 1/sqrt(I), as PEFT's is, and ``out`` is 0.

    Raises:
        InputError: a target is no kernel of the model.
    """
    adapter = {}
    for name, (inputs, outputs) in _kernel_shapes(config, lora).items():
        bound = inputs**-0.5
        own_key = jax.random.fold_in(key, TARGETS.index(name))
        shape = (config.num_layers, inputs, lora.rank)
        adapter[name] = {
            "in": jax.random.uniform(own_key, shape, jnp.float32, -bound, bound),
            "out": jnp.zeros((config.num_layers, lora.rank, outputs), jnp.float32),
        }
    return adapter


def adapter_axes(config: ModelConfig, lora: LoraConfig) -> dict[str, dict[str, jax.sharding.PartitionSpec]]:
    """Logical axis names of an adapter: those of the kernels, and ``lora_rank``."""
    _kernel_shapes(config, lora)
    axes = {name: layer_axes(config)[name][1] for name in lora.targets}
    return {
        name: {
            "in": jax.sharding.PartitionSpec("layers", inputs, "lora_rank"),
            "out": jax.sharding.PartitionSpec("layers", "lora_rank", outputs),
        }
        for name, (inputs, outputs) in axes.items()
    }


def with_adapter(params: Params, adapter: Adapter, lora: LoraConfig) -> Params:
    """Parameters of base and adapter together, for every function that takes parameters; copies nothing of the base.

    A ``head`` beside the ``decoder`` stays. Two adapters on one base do not add up: of a shared target the later wins.
    """
    added = {}
    for name, pair in adapter.items():
        added[f"{name}_lora_in"] = pair["in"]
        added[f"{name}_lora_out"] = pair["out"] * lora.scale
    layers = {**params["decoder"]["layers"], **added}
    return {**params, "decoder": {**params["decoder"], "layers": layers}}


def merge_adapter(params: Params, adapter: Adapter, lora: LoraConfig) -> Params:
    """Parameters of the base's own tree with the additions in the kernels: W + (alpha / r) in @ out."""
    layers = dict(params["decoder"]["layers"])
    for name, pair in adapter.items():
        layers[name] = layers[name] + lora.scale * jnp.einsum("lir,lro->lio", pair["in"], pair["out"])
    return {**params, "decoder": {**params["decoder"], "layers": layers}}


def save_adapter(
    path: str | os.PathLike[str],
    config: ModelConfig,
    adapter: Adapter,
    lora: LoraConfig,
    *,
    base_model: str,
    head: Mapping[str, Any] | None = None,
) -> None:
    """Writes an adapter as PEFT does: ``adapter_config.json`` and ``adapter_model.safetensors``.

    base_model: the directory or hub id of the base, which PEFT loads first. head: of a reward or value model, whose
    kernel goes along (PEFT's ``modules_to_save``) and whose bias, as in ``save_pretrained_scalar``, into a field
    ``score_bias``. Families that keep query, key and value in one tensor (GPT-2, GPT-NeoX) get one addition for the
    three: its rank is the sum of theirs, its numbers are the same.

    Raises:
        InputError: checkpoints of the model's family cannot say what the model is; the message names the field.
    """
    config_to_huggingface(config)
    family = FAMILIES[config.family]
    tensors, ranks = {}, {}
    for module, names in _modules(family, tuple(adapter)).items():
        stored = family.layers[names[0]]
        for layer in range(config.num_layers):
            pairs = {name: {k: np.asarray(v[layer]) for k, v in adapter[name].items()} for name in names}
            inwards, outwards = _their_pair(config, stored, pairs)
            where = _where(family, layer, module)
            tensors |= {f"{where}.lora_A.weight": inwards, f"{where}.lora_B.weight": outwards}
            ranks[module] = inwards.shape[0]
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if head is None else "SEQ_CLS",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != lora.rank},
        "alpha_pattern": {m: lora.scale * rank for m, rank in ranks.items() if rank != lora.rank},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(family.layers[name].layout in _CONV for name in adapter),
        "inference_mode": True,
        "modules_to_save": None if head is None else ["score"],
    }
    if head is not None:
        tensors[_SCORE] = np.asarray(head["kernel"])[None]
        fields["score_bias"] = float(head["bias"])
    directory = pathlib.Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    tensor_files.write_file(directory / _WEIGHTS, tensors)
    tensor_files.write_json(directory / _CONFIG, fields)


# Kernels that lie [in, out], which PEFT calls fan_in_fan_out.
_CONV = ("same", "third_of_columns")

# Settings of PEFT -> the only values that this module computes; a missing or null one is the same.
_ONLY = {
    "peft_type": "LORA",
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "lora_bias": False,
    "layers_to_transform": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "kasa_config": None,
    "velora_config": None,
}


def load_adapter(
    path: str | os.PathLike[str], config: ModelConfig
) -> tuple[LoraConfig, Adapter, dict[str, jax.Array] | None]:
    """Reads what PEFT or ``save_adapter`` wrote for a base of this config: its settings, the adapter, a head or None.

    Raises:
        InputError: the directory or a file cannot be used, or holds what is no plain LoRA; the message names it.
    """
    directory = pathlib.Path(path)
    file = directory / _CONFIG
    fields = tensor_files.read_json(file, "give a directory that PEFT or this project saved")
    for name, only in _ONLY.items():
        if fields.get(name) not in (None, only):
            raise InputError(f"{file}: {name} is {fields[name]!r}: give an adapter where it is {only!r}")
    family = FAMILIES[config.family]
    files = tensor_files.TensorFiles(directory, weights=_WEIGHTS)
    modules = _modules(family, tuple(name for name in TARGETS if name in layer_axes(config)))
    found = {m: names for m, names in modules.items() if f"{_where(family, 0, m)}.lora_A.weight" in files}
    targets = tuple(name for name in TARGETS if any(name in names for names in found.values()))
    if not targets:
        raise InputError(f"{directory} adds to no kernel of this model: give an adapter that was made for it")
    try:
        lora = LoraConfig(rank=fields.get("r"), alpha=fields.get("lora_alpha"), targets=targets)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    _check_adapter(config, family, files, fields, file, lora, found)
    adapter: Adapter = {}
    for module, names in found.items():
        for name in names:
            pairs = [
                _our_pair(config, files, family, module, layer, name) for layer in range(config.num_layers)
            ]
            adapter[name] = {k: jnp.asarray(np.stack([pair[k] for pair in pairs])) for k in ("in", "out")}
    if _SCORE not in files:
        return lora, adapter, None
    kernel = files.read(_SCORE, (slice(0, 1), slice(0, config.width)))[0]
    head = {"kernel": jnp.asarray(kernel), "bias": jnp.float32(fields.get("score_bias", 0.0))}
    return lora, adapter, head


def _kernel_shapes(config: ModelConfig, lora: LoraConfig) -> dict[str, tuple[int, int]]:
    shapes = {name: shape for name, (shape, _) in layer_axes(config).items()}
    for name in lora.targets:
        if name not in shapes:
            raise InputError(f"lora field targets names {name}, which this model does not have: take it out")
    return {name: shapes[name] for name in lora.targets}


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _modules(family: Family, targets: tuple[str, ...]) -> dict[str, list[str]]:
    """Their module, without the layer -> our kernels in it."""
    modules: dict[str, list[str]] = {}
    for name in targets:
        modules.setdefault(family.layers[name].tensor.removesuffix(".weight"), []).append(name)
    return modules


def _where(family: Family, layer: int, module: str) -> str:
    return f"base_model.model.{family.prefix}{family.layer.format(layer=layer)}{module}"


def _their_pair(
    config: ModelConfig, stored: Stored, pairs: Mapping[str, Mapping[str, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """PEFT's A [r, in] and B [out, r] of one module; several additions stand side by side."""
    inwards = np.concatenate([pair["in"] for pair in pairs.values()], axis=1).T
    if stored.layout in ("same", "transposed"):
        (pair,) = pairs.values()
        return inwards, pair["out"].T
    widths = {name: config.num_heads * config.head_dim for name in ("query", "key", "value")}
    thirds = {name: np.zeros((inwards.shape[0], width), np.float32) for name, width in widths.items()}
    start = 0
    for name, pair in pairs.items():
        rank = pair["out"].shape[0]
        thirds[name][start : start + rank] = pair["out"]
        start += rank
    joined = join_thirds(config, stored, list(thirds.values()))
    return inwards, joined.T if stored.layout == "third_of_columns" else joined


def _our_pair(
    config: ModelConfig, files: tensor_files.TensorFiles, family: Family, module: str, layer: int, name: str
) -> dict[str, np.ndarray]:
    where, stored = _where(family, layer, module), family.layers[name]
    inwards, outwards = (files.read_whole(f"{where}.lora_{side}.weight") for side in "AB")
    if stored.layout in ("same", "transposed"):
        return {"in": inwards.T, "out": outwards.T}
    whole = outwards.T if stored.layout == "third_of_columns" else outwards
    return {"in": inwards.T, "out": split_thirds(config, stored, whole)}


def _check_adapter(
    config: ModelConfig,
    family: Family,
    files: tensor_files.TensorFiles,
    fields: Mapping[str, Any],
    file: pathlib.Path,
    lora: LoraConfig,
    found: Mapping[str, list[str]],
) -> None:
    """Raises InputError unless the files hold the adapter that the fields describe, and nothing else."""
    shapes = {name: shape for name, (shape, _) in layer_axes(config).items()}
    patterns = {name: fields.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        if not isinstance(pattern, dict) or not all(_is_size(value) for value in pattern.values()):
            raise InputError(f"{file}: {name} is {pattern!r}: give an object of numbers above 0")
        strange = [key for key in pattern if not any(f".{module}".endswith(f".{key}") for module in found)]
        if strange:
            raise InputError(
                f"{file}: {name} names {strange[0]!r}, no kind of kernel here: give one size for all layers"
            )
    expected: dict[str, tuple[int, ...]] = {_SCORE: (1, config.width)} if _SCORE in files else {}
    for module, names in found.items():
        rank, alpha = (
            next((value for key, value in patterns[name].items() if f".{module}".endswith(f".{key}")), usual)
            for name, usual in (("rank_pattern", lora.rank), ("alpha_pattern", lora.alpha))
        )
        if abs(alpha / rank - lora.scale) > 1e-9 * lora.scale:
            raise InputError(
                f"{file}: rank_pattern and alpha_pattern give {module} a scale of {alpha / rank} where others have "
                f"{lora.scale}: give an adapter with one scale"
            )
        inputs, outputs = shapes[names[0]]
        outputs *= 1 if family.layers[names[0]].layout in ("same", "transposed") else 3
        for layer in range(config.num_layers):
            where = _where(family, layer, module)
            expected |= {f"{where}.lora_A.weight": (rank, inputs), f"{where}.lora_B.weight": (outputs, rank)}
    files.check(expected)
