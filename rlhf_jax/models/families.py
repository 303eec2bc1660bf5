"""What Hugging Face calls things, one table a family: tensors and fields of config.json; imports errors and config.

Everything that families share is code below the tables; a table says only what a name is, what a missing field means,
and what the family always computes. A new family is a new row, as long as ``ModelConfig`` can describe it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from rlhf_jax.errors import InputError
from rlhf_jax.models import families_rotary
from rlhf_jax.models.config import ModelConfig

# How an array of ours lies in a tensor of theirs. Our kernels are [in, out]; most of theirs are [out, in].
# third_of_columns: query, key and value side by side on the last axis. third_of_heads: by head, then by which of the
# three, on the first axis of a transposed kernel.
Layout = Literal["same", "transposed", "third_of_columns", "third_of_heads"]


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where one of our arrays is: their tensor, how it lies there, and of three the how manieth."""

    tensor: str
    layout: Layout = "same"
    third: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One family of Hugging Face checkpoints.

    causal, scalar: architectures of language models and of scorers with one label. prefix: of every tensor but heads.
    layer: of a layer's tensors, after the prefix. heads: names of the vocabulary head, the first is written.
    fields: our field -> theirs. absent: what a field of theirs means where it is missing. always: fields of ours that
    the family fixes. only: fields of theirs -> the one value that is computed.
    """

    causal: str
    scalar: str
    prefix: str
    layer: str
    heads: tuple[str, ...]
    top: Mapping[str, str]
    layers: Mapping[str, Stored]
    fields: Mapping[str, str]
    absent: Mapping[str, Any]
    always: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    activation_field: str = "hidden_act"


def _kernel(ours: str, theirs: str, layout: Layout = "transposed") -> dict[str, Stored]:
    """A kernel and its bias."""
    return {ours: Stored(f"{theirs}.weight", layout), f"{ours}_bias": Stored(f"{theirs}.bias")}


def _layer_norm(ours: str, theirs: str) -> dict[str, Stored]:
    return {ours: Stored(f"{theirs}.weight"), f"{ours}_bias": Stored(f"{theirs}.bias")}


def _fused(theirs: str, layout: Layout) -> dict[str, Stored]:
    """Query, key and value in one kernel, and their biases in one vector."""
    return {
        f"{ours}{ending}": Stored(f"{theirs}.{kind}", layout, third)
        for third, ours in enumerate(("query", "key", "value"))
        for ending, kind in (("", "weight"), ("_bias", "bias"))
    }


_LLAMA_KERNELS = {
    **_kernel("query", "self_attn.q_proj"),
    **_kernel("key", "self_attn.k_proj"),
    **_kernel("value", "self_attn.v_proj"),
    **_kernel("output", "self_attn.o_proj"),
    **_kernel("gate", "mlp.gate_proj"),
    **_kernel("up", "mlp.up_proj"),
    **_kernel("down", "mlp.down_proj"),
}
_LLAMA_LAYERS = {
    **_LLAMA_KERNELS,
    "attention_norm": Stored("input_layernorm.weight"),
    "mlp_norm": Stored("post_attention_layernorm.weight"),
}
_QUERY_KEY_NORMS = {
    "query_norm": Stored("self_attn.q_norm.weight"),
    "key_norm": Stored("self_attn.k_norm.weight"),
}
_GEMMA_LAYERS = {
    **_LLAMA_KERNELS,
    "attention_norm": Stored("input_layernorm.weight"),
    "attention_post_norm": Stored("post_attention_layernorm.weight"),
    "mlp_norm": Stored("pre_feedforward_layernorm.weight"),
    "mlp_post_norm": Stored("post_feedforward_layernorm.weight"),
}
_LLAMA_FIELDS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_width": "intermediate_size",
    "max_length": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
}
_ATTENTION_BIAS = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}
_LLAMA_ABSENT = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
}
_GEMMA_ABSENT = {
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "head_dim": 256,
}
_GEMMA_ALWAYS = {"zero_centred_norms": True, "post_norms": True, "scaled_embeddings": True}


def _like_llama(name: str, **changes: Any) -> Family:
    """A family whose tensors are named as Llama's."""
    base = {
        "causal": f"{name}ForCausalLM",
        "scalar": f"{name}ForSequenceClassification",
        "prefix": "model.",
        "layer": "layers.{layer}.",
        "heads": ("lm_head.weight",),
        "top": {"embedding": "embed_tokens.weight", "final_norm": "norm.weight"},
        "layers": _LLAMA_LAYERS,
        "fields": _LLAMA_FIELDS,
        "absent": _LLAMA_ABSENT,
    }
    return Family(**base | changes)


FAMILIES: Mapping[str, Family] = {
    "llama": _like_llama("Llama", fields=_LLAMA_FIELDS | _ATTENTION_BIAS | {"mlp_bias": "mlp_bias"}),
    "mistral": _like_llama("Mistral", absent=_LLAMA_ABSENT | {"sliding_window": 4096}),
    "qwen2": _like_llama("Qwen2", always={"qkv_bias": True}, absent=_LLAMA_ABSENT | {"sliding_window": 4096}),
    "qwen3": _like_llama(
        "Qwen3",
        fields=_LLAMA_FIELDS | _ATTENTION_BIAS,
        layers=_LLAMA_LAYERS | _QUERY_KEY_NORMS,
        always={"query_key_norms": True},
        absent=_LLAMA_ABSENT | {"sliding_window": 4096, "head_dim": 128},
    ),
    "gemma2": _like_llama(
        "Gemma2",
        fields=_LLAMA_FIELDS
        | _ATTENTION_BIAS
        | {
            "query_pre_attn_scalar": "query_pre_attn_scalar",
            "attention_softcap": "attn_logit_softcapping",
            "logit_softcap": "final_logit_softcapping",
        },
        layers=_GEMMA_LAYERS,
        always=_GEMMA_ALWAYS,
        absent=_GEMMA_ABSENT | {"sliding_window": 4096},
        only={"use_bidirectional_attention": False},
        activation_field="hidden_activation",
    ),
    "gemma3_text": _like_llama(
        "Gemma3",
        scalar="Gemma3TextForSequenceClassification",
        fields=_LLAMA_FIELDS
        | _ATTENTION_BIAS
        | {"query_pre_attn_scalar": "query_pre_attn_scalar", "logit_softcap": "final_logit_softcapping"},
        layers=_GEMMA_LAYERS | _QUERY_KEY_NORMS,
        always=_GEMMA_ALWAYS | {"query_key_norms": True},
        absent=_GEMMA_ABSENT | {"max_position_embeddings": 131072, "sliding_window": 4096},
        # transformers reads this field of a Gemma 3 and then leaves it out of its scores.
        only={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
        activation_field="hidden_activation",
    ),
    "gpt2": Family(
        causal="GPT2LMHeadModel",
        scalar="GPT2ForSequenceClassification",
        prefix="transformer.",
        layer="h.{layer}.",
        heads=("lm_head.weight",),
        top={
            "embedding": "wte.weight",
            "position_embedding": "wpe.weight",
            "final_norm": "ln_f.weight",
            "final_norm_bias": "ln_f.bias",
        },
        layers={
            **_layer_norm("attention_norm", "ln_1"),
            **_fused("attn.c_attn", "third_of_columns"),
            **_kernel("output", "attn.c_proj", "same"),
            **_layer_norm("mlp_norm", "ln_2"),
            **_kernel("up", "mlp.c_fc", "same"),
            **_kernel("down", "mlp.c_proj", "same"),
        },
        fields={
            "vocab_size": "vocab_size",
            "width": "n_embd",
            "num_layers": "n_layer",
            "num_heads": "n_head",
            "mlp_width": "n_inner",
            "max_length": "n_positions",
            "norm_epsilon": "layer_norm_epsilon",
            "tied_embeddings": "tie_word_embeddings",
        },
        absent={
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "n_positions": 1024,
            "activation_function": "gelu_new",
        },
        always={
            "norm": "layer",
            "positions": "learned",
            "gated_mlp": False,
            "qkv_bias": True,
            "output_bias": True,
            "mlp_bias": True,
        },
        only={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        activation_field="activation_function",
    ),
    "gpt_neox": Family(
        causal="GPTNeoXForCausalLM",
        scalar="GPTNeoXForSequenceClassification",
        prefix="gpt_neox.",
        layer="layers.{layer}.",
        heads=("embed_out.weight", "lm_head.weight"),
        top={
            "embedding": "embed_in.weight",
            "final_norm": "final_layer_norm.weight",
            "final_norm_bias": "final_layer_norm.bias",
        },
        layers={
            **_layer_norm("attention_norm", "input_layernorm"),
            **_fused("attention.query_key_value", "third_of_heads"),
            **_kernel("output", "attention.dense"),
            **_layer_norm("mlp_norm", "post_attention_layernorm"),
            **_kernel("up", "mlp.dense_h_to_4h"),
            **_kernel("down", "mlp.dense_4h_to_h"),
        },
        fields={
            "vocab_size": "vocab_size",
            "width": "hidden_size",
            "num_layers": "num_hidden_layers",
            "num_heads": "num_attention_heads",
            "mlp_width": "intermediate_size",
            "max_length": "max_position_embeddings",
            "norm_epsilon": "layer_norm_eps",
            "tied_embeddings": "tie_word_embeddings",
            "parallel_residual": "use_parallel_residual",
            **_ATTENTION_BIAS,
        },
        absent={
            "max_position_embeddings": 2048,
            "layer_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "use_parallel_residual": True,
            "attention_bias": True,
            "hidden_act": "gelu",
        },
        always={"norm": "layer", "gated_mlp": False, "mlp_bias": True},
    ),
}

# Their names of activations -> ours; the first of each is written, but where a family has another.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


def family_of(fields: Mapping[str, Any], *, scalar: bool) -> str:
    """The family of a config.json, whose architecture must be a language model or, with ``scalar``, a scorer.

    Raises:
        InputError: another architecture.
    """
    kind = "scalar" if scalar else "causal"
    family = FAMILIES.get(fields.get("model_type", "llama"))
    wanted = getattr(family, kind, None)
    named = fields.get("architectures") or ([wanted] if "model_type" in fields else None)
    if family is None or named != [wanted]:
        known = ", ".join(getattr(family, kind) for family in FAMILIES.values())
        raise InputError(
            f"architectures is {named!r} with model_type {fields.get('model_type')!r}: give a checkpoint of one of "
            f"{known}"
        )
    return fields.get("model_type", "llama")


def config_from_huggingface(fields: Mapping[str, Any], *, scalar: bool = False) -> ModelConfig:
    """The fields of a config.json -> ModelConfig; older and newer spellings are read.

    Raises:
        InputError: another architecture, a setting that this decoder does not compute, or a field missing or of
            another type than it should have.
    """
    try:
        return _config(fields, scalar=scalar)
    except InputError:
        raise
    # What a list where a number should be, and the like, ends in.
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"a field is of another type than it should be ({error}): give the config.json that belongs to the weights"
        ) from error


def _config(fields: Mapping[str, Any], *, scalar: bool) -> ModelConfig:
    name = family_of(fields, scalar=scalar)
    family = FAMILIES[name]
    if fields.get("quantization_config") is not None:
        raise InputError("quantization_config is set: give a checkpoint that is not quantised")
    for theirs, only in family.only.items():
        if fields.get(theirs, only) != only and not (only is False and fields[theirs] is None):
            raise InputError(f"{theirs} is {fields[theirs]!r}: give a checkpoint where it is {only!r}")
    if scalar and len(fields.get("id2label", {0: "", 1: ""})) != 1:
        raise InputError("id2label does not name exactly one label: give one saved with num_labels=1")
    ours = {field: _value(family, fields, theirs) for field, theirs in family.fields.items()}
    for field, derived in _derived(family, ours).items():
        if ours.get(field) is None:
            ours[field] = derived
    for field, value in ours.items():
        if value is None and field not in ("attention_softcap", "logit_softcap"):
            theirs = family.fields[field]
            raise InputError(f"{theirs} is missing: give the config.json that belongs to the weights")
    activation = _value(family, fields, family.activation_field)
    if activation not in _ACTIVATIONS:
        raise InputError(
            f"{family.activation_field} is {activation!r}: give a checkpoint with one of {', '.join(_ACTIVATIONS)}"
        )
    ours |= {"family": name, "activation": _ACTIVATIONS[activation], **family.always}
    ours |= families_rotary.read(name, fields, family.absent, ours)
    return ModelConfig(**ours)


def _value(family: Family, fields: Mapping[str, Any], theirs: str) -> Any:
    """A field, or what its absence means; a null of a field with no such meaning is None."""
    if theirs in fields and (fields[theirs] is not None or theirs.endswith("softcapping")):
        return fields[theirs]
    return family.absent.get(theirs)


def _derived(family: Family, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that follow from others where config.json leaves them out."""
    width, heads = ours["width"], ours["num_heads"]
    if not all(isinstance(x, int) and not isinstance(x, bool) and x > 0 for x in (width, heads)):
        return {}
    derived = {"num_kv_heads": heads, "head_dim": width // heads}
    return derived | ({"mlp_width": 4 * width} if family.fields["mlp_width"] == "n_inner" else {})


def config_to_huggingface(config: ModelConfig, *, scalar: bool = False) -> dict[str, Any]:
    """The fields of config.json that describe the model, which ``config_from_huggingface`` reads back.

    Raises:
        InputError: checkpoints of the model's family cannot say what the model is; the message names the field.
    """
    family = FAMILIES.get(config.family)
    if family is None:
        raise InputError(f"model field family is {config.family!r}: give one of {', '.join(FAMILIES)}")
    theirs = {name: getattr(config, field) for field, name in family.fields.items()}
    if "query_pre_attn_scalar" in theirs and config.query_pre_attn_scalar is None:
        theirs["query_pre_attn_scalar"] = config.head_dim
    names = [name for name, ours in _ACTIVATIONS.items() if ours == config.activation]
    usual = family.absent[family.activation_field]
    theirs[family.activation_field] = usual if usual in names else names[0]
    theirs |= families_rotary.write(config, family.absent) | dict(family.only)
    theirs |= {
        "architectures": [family.scalar if scalar else family.causal],
        "model_type": config.family,
    }
    if scalar:
        theirs |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    said, meant = (_plain(x) for x in (config_from_huggingface(theirs, scalar=scalar), config))
    for field in dataclasses.fields(ModelConfig):
        if getattr(said, field.name) != getattr(meant, field.name):
            raise InputError(
                f"model field {field.name} is {getattr(meant, field.name)!r}, which a checkpoint of family "
                f"{config.family} cannot say ({getattr(said, field.name)!r} there): set family to one that can"
            )
    return theirs


def _plain(config: ModelConfig) -> ModelConfig:
    """The config with everything that changes no number set to its default, and what is implied said."""
    default = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    idle = ["compute_dtype", "remat", "attention"]
    if config.rope_scaling == "none":
        idle += ["rope_factor"]
    if config.rope_scaling != "llama3":
        idle += ["rope_low_frequency_factor", "rope_high_frequency_factor", "rope_original_length"]
    if config.positions == "learned":
        idle += ["rope_theta", "rotary_fraction", "local_rope_theta", "rope_scaling", "rope_factor"]
    if not any(config.windowed):
        idle += ["window", "local_rope_theta"]
    if config.local_rope_theta == config.rope_theta and config.rope_scaling == "none":
        idle += ["local_rope_theta"]
    changes = {name: default[name] for name in idle}
    changes["window_pattern"] = config.windowed if any(config.windowed) else default["window_pattern"]
    if config.query_pre_attn_scalar is None:
        changes["query_pre_attn_scalar"] = config.head_dim
    return dataclasses.replace(config, **changes)
