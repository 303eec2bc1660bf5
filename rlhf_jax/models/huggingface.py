"""Llama checkpoints of Hugging Face, in and out, as safetensors only; imports errors and models only.

A directory holds ``config.json`` and ``model.safetensors`` (or ``model.safetensors.index.json`` and the
shards it names). Pickled weights are never opened. Files are read one tensor at a time into the stacked
arrays of the decoder, so that host memory holds the model once.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from rlhf_jax.errors import InputError
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.decoder import Params, parameter_shapes

_CAUSAL, _SCALAR = "LlamaForCausalLM", "LlamaForSequenceClassification"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")

# Our name -> theirs. Their kernels are [out, in]; ours, named in _TRANSPOSED, are [in, out].
_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_TRANSPOSED = frozenset({"query", "key", "value", "output", "gate", "up", "down"})
_TOP_NAMES = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight"}
_HEAD_NAME = "lm_head.weight"

# Fields of config.json -> the only values this decoder computes.
_REQUIRED_VALUES = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def load_pretrained(path: str | os.PathLike[str]) -> tuple[ModelConfig, Params]:
    """Reads a LlamaForCausalLM directory: its config and ``{"decoder": {...}}``, float32.

    Raises:
        InputError: the directory, its config.json or its weights cannot be used; the message names the file.
    """
    directory = pathlib.Path(path)
    config = _read_config(directory, _CAUSAL)
    tensors = _Tensors(directory)
    decoder = _read_decoder(config, tensors, with_head=True)
    tensors.refuse_unread()
    return config, {"decoder": decoder}


def load_pretrained_scalar(path: str | os.PathLike[str]) -> tuple[ModelConfig, Params]:
    """Reads a LlamaForSequenceClassification directory with one label: ``{"decoder": ..., "head": ...}``.

    transformers' head has no bias; a ``score.bias`` written by ``save_pretrained_scalar`` is read, else it is
    0.

    Raises:
        InputError: as ``load_pretrained``.
    """
    directory = pathlib.Path(path)
    config = _read_config(directory, _SCALAR)
    tensors = _Tensors(directory)
    decoder = _read_decoder(config, tensors, with_head=False)
    kernel = tensors.read("score.weight", (1, config.width))[0]
    bias = tensors.read("score.bias", (1,))[0] if "score.bias" in tensors else np.float32(0)
    tensors.refuse_unread()
    return config, {"decoder": decoder, "head": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}


def save_pretrained(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
) -> None:
    """Writes a directory that transformers loads as LlamaForCausalLM, float32; files of the same name are
    replaced.

    The token ids go into config.json, where ``generate`` of transformers looks for them.
    """
    tensors = dict(_decoder_tensors(config, params["decoder"]))
    if not config.tied_embeddings:
        tensors[_HEAD_NAME] = np.asarray(params["decoder"]["unembedding"])
    fields = _to_huggingface(config, _CAUSAL, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id)
    _write(pathlib.Path(path), fields, tensors)


def save_pretrained_scalar(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
) -> None:
    """Writes a reward or value model as a LlamaForSequenceClassification with one label.

    transformers' head has no bias: one that is not 0 is written as ``score.bias``, which transformers reports
    as unexpected and leaves out, so that its scores differ from ours by that constant. An untied vocabulary
    head is not part of such a model and is not written. transformers needs ``pad_id`` to score more than one
    row at once.
    """
    tensors = dict(_decoder_tensors(config, params["decoder"]))
    tensors["score.weight"] = np.asarray(params["head"]["kernel"])[None]
    bias = np.asarray(params["head"]["bias"])
    if bias != 0:
        tensors["score.bias"] = bias[None]
    fields = _to_huggingface(config, _SCALAR, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id) | {
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }
    _write(pathlib.Path(path), fields, tensors)


def _read_json(file: pathlib.Path, remedy: str) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file} is missing: {remedy}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} is not JSON ({error}): {remedy}") from None
    if not isinstance(fields, dict):
        raise InputError(f"{file} holds a {type(fields).__name__}, not an object: {remedy}")
    return fields


def _read_config(directory: pathlib.Path, architecture: str) -> ModelConfig:
    if not directory.is_dir():
        raise InputError(f"model directory {directory} is missing: give a Hugging Face directory that exists")
    file = directory / "config.json"
    fields = _read_json(file, "give a directory that transformers or this project saved")
    try:
        return config_from_huggingface(fields, architecture=architecture)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def config_from_huggingface(fields: Mapping[str, Any], *, architecture: str = _CAUSAL) -> ModelConfig:
    """The fields of a config.json -> ModelConfig; both spellings of the rotary settings are read.

    Raises:
        InputError: another architecture, a setting that this decoder does not compute, or a field missing.
    """
    named = fields.get("architectures") or [architecture if fields.get("model_type") == "llama" else None]
    if named != [architecture] or fields.get("model_type", "llama") != "llama":
        raise InputError(
            f"architectures is {named!r} with model_type {fields.get('model_type')!r}: give a checkpoint of "
            f"{architecture}"
        )
    for name, only in _REQUIRED_VALUES.items():
        if fields.get(name, only) != only:
            raise InputError(f"{name} is {fields[name]!r}: give a checkpoint where it is {only!r}")
    if architecture == _SCALAR and len(fields.get("id2label", {0: "", 1: ""})) != 1:
        raise InputError("id2label does not name exactly one label: give one saved with num_labels=1")
    rotary = (fields.get("rope_scaling") or {}) | (fields.get("rope_parameters") or {})
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind != "default":
        raise InputError(f"rope_type is {kind!r}: give a checkpoint without rope scaling")

    def required(name: str) -> Any:
        if fields.get(name) is None:
            raise InputError(f"{name} is missing: give the config.json that belongs to the weights")
        return fields[name]

    def optional(name: str, default: Any) -> Any:
        return default if fields.get(name) is None else fields[name]

    width, heads = required("hidden_size"), required("num_attention_heads")
    return ModelConfig(
        vocab_size=required("vocab_size"),
        width=width,
        num_layers=required("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=optional("num_key_value_heads", heads),
        head_dim=optional("head_dim", width // heads),
        mlp_width=required("intermediate_size"),
        max_length=optional("max_position_embeddings", 2048),
        rope_theta=rotary.get("rope_theta", optional("rope_theta", 10000.0)),
        norm_epsilon=optional("rms_norm_eps", 1e-6),
        tied_embeddings=optional("tie_word_embeddings", False),
    )


def _to_huggingface(
    config: ModelConfig, architecture: str, *, bos_id: int | None, eos_id: int | None, pad_id: int | None
) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_length,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "dtype": "float32",
        **_REQUIRED_VALUES,
    }


class _Tensors:
    """The tensors of a directory by name; remembers which were read, so that none is left out in silence."""

    def __init__(self, directory: pathlib.Path) -> None:
        self._files = _open_all(directory)
        self._unread = set(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor as float32."""
        if name not in self._files:
            some_file = next(iter(self._files.values()))[0]
            raise InputError(
                f"{some_file.parent} has no tensor {name}: give weights that belong to its config.json"
            )
        file, handle = self._files[name]
        piece = handle.get_slice(name)
        if tuple(piece.get_shape()) != shape:
            raise InputError(
                f"{file}: tensor {name} has shape {tuple(piece.get_shape())} where config.json says {shape}: "
                "give weights that belong to this config.json"
            )
        if piece.get_dtype() not in _FLOATS:
            raise InputError(
                f"{file}: tensor {name} is {piece.get_dtype()}: give weights of one of {', '.join(_FLOATS)}"
            )
        self._unread.discard(name)
        return handle.get_tensor(name).astype(np.float32)

    def refuse_unread(self) -> None:
        """Raises InputError if the files hold a tensor that the model has no place for."""
        # Old exports carry the rotary wavelengths as a buffer; they follow from the config.
        extra = sorted(name for name in self._unread if not name.endswith("rotary_emb.inv_freq"))
        if extra:
            raise InputError(
                f"{self._files[extra[0]][0]}: {len(extra)} tensor(s) have no place in the model, first "
                f"{extra[0]}: give weights that belong to this config.json"
            )


def _open_all(directory: pathlib.Path) -> dict[str, tuple[pathlib.Path, Any]]:
    """Tensor name -> (file, open handle) over every weight file of the directory."""
    index = directory / _INDEX
    if (directory / _WEIGHTS).is_file():
        files = [directory / _WEIGHTS]
    elif index.is_file():
        shards = _read_json(index, "download the checkpoint again").get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise InputError(f"{index} has no weight_map: download the checkpoint again")
        files = [directory / name for name in sorted(set(shards.values()))]
    else:
        pickled = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in directory.glob(kind))
        if pickled:
            raise InputError(
                f"{directory / pickled[0]} is pickled, which can run code when opened, and is refused: save "
                "the model again as safetensors (transformers does so by default)"
            )
        raise InputError(f"{directory} has no weights: add {_WEIGHTS}, or {_INDEX} with its shards")
    found: dict[str, tuple[pathlib.Path, Any]] = {}
    for file in files:
        try:
            handle = safetensors.safe_open(file, framework="numpy")
        except FileNotFoundError:
            raise InputError(
                f"{file} is named by {index.name} and missing: download the checkpoint again"
            ) from None
        except safetensors.SafetensorError as error:
            raise InputError(
                f"{file} is not a whole safetensors file ({error}): download or save the checkpoint again"
            ) from None
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            if name in found:
                raise InputError(
                    f"{file}: tensor {name} is in {found[name][0].name} too: download the checkpoint again"
                )
            found[name] = (file, handle)
    if not found:
        raise InputError(f"{files[0]} holds no tensors: download or save the checkpoint again")
    return found


def _layer_name(index: int, name: str) -> str:
    return f"model.layers.{index}.{_LAYER_NAMES[name]}.weight"


def _read_decoder(config: ModelConfig, tensors: _Tensors, *, with_head: bool) -> Params:
    shapes = parameter_shapes(config)["decoder"]
    decoder: Params = {}
    for name, theirs in _TOP_NAMES.items():
        decoder[name] = jnp.asarray(tensors.read(theirs, shapes[name]))
    layers = {}
    for name, shape in shapes["layers"].items():
        stacked = np.empty(shape, np.float32)
        for i in range(config.num_layers):
            if name in _TRANSPOSED:
                stacked[i] = tensors.read(_layer_name(i, name), shape[:0:-1]).T
            else:
                stacked[i] = tensors.read(_layer_name(i, name), shape[1:])
        layers[name] = jnp.asarray(stacked)
    decoder["layers"] = layers
    if not config.tied_embeddings and with_head:
        decoder["unembedding"] = jnp.asarray(tensors.read(_HEAD_NAME, shapes["unembedding"]))
    elif config.tied_embeddings and _HEAD_NAME in tensors:
        head = tensors.read(_HEAD_NAME, shapes["embedding"])
        if not np.array_equal(head, np.asarray(decoder["embedding"])):
            raise InputError(
                f"tensor {_HEAD_NAME} differs from {_TOP_NAMES['embedding']} although config.json ties them: "
                "set tie_word_embeddings to false"
            )
    return decoder


def _decoder_tensors(config: ModelConfig, decoder: Params) -> Iterator[tuple[str, np.ndarray]]:
    for ours, theirs in _TOP_NAMES.items():
        yield theirs, np.asarray(decoder[ours])
    for name, stacked in decoder["layers"].items():
        for i in range(config.num_layers):
            array = np.asarray(stacked[i])
            yield _layer_name(i, name), array.T if name in _TRANSPOSED else array


def _write(directory: pathlib.Path, fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()}
    # Whole files under temporary names first: a reader never sees half a file.
    weights, config = directory / _WEIGHTS, directory / "config.json"
    safetensors.numpy.save_file(contiguous, f"{weights}.partial", metadata={"format": "pt"})
    pathlib.Path(f"{config}.partial").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    os.replace(f"{weights}.partial", weights)
    os.replace(f"{config}.partial", config)
