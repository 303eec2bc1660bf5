"""Rotary positions and attention windows as config.json spells them, old and new; imports errors and config.

Of everything in a config.json these two have the most spellings: transformers 5 nests what its predecessors kept in
fields of their own, and each family began with other names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlhf_jax.errors import InputError
from rlhf_jax.models.config import ModelConfig

_LLAMA3 = {
    "rope_low_frequency_factor": "low_freq_factor",
    "rope_high_frequency_factor": "high_freq_factor",
    "rope_original_length": "original_max_position_embeddings",
}
_KINDS = {"default": "none", "linear": "linear", "llama3": "llama3"}

# Whether layer i has a window, of the families whose config.json may leave out layer_types.
_USUAL_PATTERN: Mapping[str, Callable[[int, Mapping[str, Any]], bool]] = {
    "mistral": lambda i, fields: True,
    "qwen2": lambda i, fields: i >= fields.get("max_window_layers", 28),
    "qwen3": lambda i, fields: i >= fields.get("max_window_layers", 28),
    "gemma2": lambda i, fields: i % 2 == 0,
    "gemma3_text": lambda i, fields: (i + 1) % fields.get("sliding_window_pattern", 6) != 0,
}


def read(
    family: str, fields: Mapping[str, Any], absent: Mapping[str, Any], ours: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of ModelConfig for positions and windows; ``ours`` are those already read.

    Raises:
        InputError: a kind of scaling, or a layer type, that this decoder does not compute, or a setting missing.
    """
    windows = _read_windows(family, fields, absent, ours["num_layers"])
    return windows | ({} if ours.get("positions") == "learned" else _read_rotary(family, fields, ours))


def _read_rotary(family: str, fields: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    new = fields.get("rope_parameters") or {}
    local = {}
    if family == "gemma3_text":
        local = new.get("sliding_attention") or {}
        new = new.get("full_attention") or {key: new[key] for key in new if key != "sliding_attention"}
    rope = (fields.get("rope_scaling") or {}) | new
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _KINDS:
        raise InputError(f"rope_type is {kind!r}: give a checkpoint with one of {', '.join(_KINDS)}")

    def setting(name: str, default: Any = None) -> Any:
        value = rope.get(name, default)
        if value is None:
            raise InputError(f"rope_parameters has no {name}, which rope_type {kind!r} needs: add it")
        return value

    theta = rope.get("rope_theta") or fields.get("rope_theta") or fields.get("rotary_emb_base")
    read = {"rope_theta": theta or (1e6 if family == "gemma3_text" else 1e4), "rope_scaling": _KINDS[kind]}
    if kind != "default":
        read["rope_factor"] = setting("factor")
    if kind == "llama3":
        before = {"original_max_position_embeddings": ours["max_length"]}
        read |= {field: setting(name, before.get(name)) for field, name in _LLAMA3.items()}
    fraction = rope.get(
        "partial_rotary_factor", fields.get("rotary_pct", fields.get("partial_rotary_factor"))
    )
    if family == "gpt_neox":
        read["rotary_fraction"] = 0.25 if fraction is None else fraction
    elif fraction not in (None, 1.0):
        raise InputError(f"partial_rotary_factor is {fraction!r}: give a checkpoint where it is 1.0")
    if family == "gemma3_text":
        if local.get("rope_type", "default") != "default":
            raise InputError(
                f"rope_type of sliding_attention is {local['rope_type']!r}: give a checkpoint with 'default' there"
            )
        read["local_rope_theta"] = local.get("rope_theta") or fields.get("rope_local_base_freq") or 1e4
    return read


def _read_windows(
    family: str, fields: Mapping[str, Any], absent: Mapping[str, Any], num_layers: Any
) -> dict[str, Any]:
    if family not in _USUAL_PATTERN or not isinstance(num_layers, int):
        return {}
    window = fields.get("sliding_window", absent["sliding_window"])
    if window is None or (family in ("qwen2", "qwen3") and not fields.get("use_sliding_window", False)):
        return {}
    types = None if family == "mistral" else fields.get("layer_types")
    if types is None:
        pattern = [_USUAL_PATTERN[family](i, fields) for i in range(num_layers)]
    else:
        strange = sorted({str(kind) for kind in types} - {"sliding_attention", "full_attention"})
        if strange:
            raise InputError(
                f"layer_types names {strange[0]!r}: give sliding_attention or full_attention only"
            )
        if len(types) != num_layers:
            raise InputError(
                f"layer_types has {len(types)} entries for {num_layers} layers: give one a layer"
            )
        pattern = [kind == "sliding_attention" for kind in types]
    return {"window": window, "window_pattern": _period(pattern)} if any(pattern) else {}


def _period(pattern: list[bool]) -> tuple[bool, ...]:
    """The shortest beginning of a pattern that gives all of it when repeated."""
    lengths = (
        n for n in range(1, len(pattern) + 1) if all(x == pattern[i % n] for i, x in enumerate(pattern))
    )
    return tuple(pattern[: next(lengths)])


def write(config: ModelConfig, absent: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json for positions and windows, in the new spelling, and in the old where one was."""
    fields = _write_windows(config, absent)
    if config.positions == "learned":
        return fields
    kind = next(name for name, ours in _KINDS.items() if ours == config.rope_scaling)
    rope: dict[str, Any] = {"rope_type": kind}
    if kind != "default":
        rope["factor"] = config.rope_factor
    if kind == "llama3":
        rope |= {name: getattr(config, field) for field, name in _LLAMA3.items()}
    if kind != "default":
        fields["rope_scaling"] = dict(rope)
    rope["rope_theta"] = config.rope_theta
    if config.family == "gpt_neox":
        rope["partial_rotary_factor"] = config.rotary_fraction
        fields |= {"rotary_pct": config.rotary_fraction, "rotary_emb_base": config.rope_theta}
    else:
        fields["rope_theta"] = config.rope_theta
    if config.family == "gemma3_text":
        local = config.rope_theta if config.local_rope_theta is None else config.local_rope_theta
        fields["rope_local_base_freq"] = local
        rope = {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    return fields | {"rope_parameters": rope}


def _write_windows(config: ModelConfig, absent: Mapping[str, Any]) -> dict[str, Any]:
    if config.family not in _USUAL_PATTERN:
        return {}
    if config.family == "mistral":
        return {"sliding_window": config.window if any(config.windowed) else None}
    types = ["sliding_attention" if windowed else "full_attention" for windowed in config.windowed]
    fields = {"layer_types": types}
    if config.family in ("qwen2", "qwen3"):
        fields["use_sliding_window"] = any(config.windowed)
        fields["max_window_layers"] = (
            types.index("sliding_attention") if any(config.windowed) else config.num_layers
        )
    # A layer without a window reads nothing of this, and transformers wants a number for Gemma.
    return fields | {"sliding_window": config.window or absent["sliding_window"]}
