"""Checkpoints of Hugging Face, in and out, as safetensors only; imports errors, storage and models.

A directory holds ``config.json`` and ``model.safetensors`` (or ``model.safetensors.index.json`` and the shards it
names). What differs between families is in ``families``. Tensors are read slice by slice straight into the arrays of
the decoder, on whatever devices these live, and written shard by shard: host memory never holds the model twice.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import storage
from rlhf_jax.errors import InputError
from rlhf_jax.models import tensor_files
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.decoder import Params, parameter_shapes
from rlhf_jax.models.families import (
    FAMILIES,
    Family,
    Stored,
    config_from_huggingface,
    config_to_huggingface,
)
from rlhf_jax.models.tensor_files import TensorFiles

_SCORE, _SCORE_BIAS = "score.weight", "score_bias"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What is fetched from the hub: weights, configs, tokenizers and chat templates; no code and no pickles.
_HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
# The size of a shard that transformers writes.
MAX_SHARD_BYTES = 5 * 10**9

Index = tuple[slice, ...]


def from_pretrained(
    path_or_hub_id: str | os.PathLike[str], *, shardings: Any = None
) -> tuple[ModelConfig, Params]:
    """Reads a language model: its config and ``{"decoder": {...}}``, float32.

    path_or_hub_id: a directory, or the name of a repository on the Hugging Face hub, which is fetched. shardings: where
    every array is to live, one sharding for all or a tree of them like the parameters (``read_config`` and
    ``decoder.logical_axes`` give the tree); each process reads what its own devices hold. None: the default device.

    Raises:
        InputError: the directory, its config.json or its weights cannot be used; the message names the file.
    """
    directory, config, family = _open(path_or_hub_id, scalar=False)
    files = TensorFiles(directory, family.prefix)
    head = next((name for name in family.heads if name in files), family.heads[0])
    files.check(
        _tensor_shapes(config, family, head=head if head in files or not config.tied_embeddings else None)
    )
    decoder = _read_decoder(config, family, files, head, _by_leaf(shardings, "decoder"))
    return config, {"decoder": decoder}


def load_pretrained_scalar(
    path_or_hub_id: str | os.PathLike[str], *, shardings: Any = None
) -> tuple[ModelConfig, Params]:
    """Reads a scorer with one label (``...ForSequenceClassification``): ``{"decoder": ..., "head": ...}``.

    transformers' head has no bias; one that ``save_pretrained_scalar`` left in config.json is read, else it is 0. An
    untied vocabulary head is not part of such a checkpoint: the config says that embeddings are tied.

    Raises:
        InputError: as ``from_pretrained``.
    """
    directory, config, family = _open(path_or_hub_id, scalar=True)
    bias = tensor_files.read_json(directory / "config.json", "restore it").get(_SCORE_BIAS, 0.0)
    if not isinstance(bias, int | float):
        raise InputError(f"{directory / 'config.json'}: {_SCORE_BIAS} is {bias!r}: give a number")
    files = TensorFiles(directory, family.prefix)
    files.check(_tensor_shapes(config, family, head=None) | {_SCORE: (1, config.width)})
    decoder = _read_decoder(config, family, files, None, _by_leaf(shardings, "decoder"))
    where = _by_leaf(shardings, "head")
    head = {
        "kernel": _place(
            (config.width,), where("kernel"), lambda i: files.read(_SCORE, (slice(0, 1), *i))[0]
        ),
        "bias": _place((), where("bias"), lambda _: np.asarray(bias, np.float32)),
    }
    return config, {"decoder": decoder, "head": head}


def read_config(path_or_hub_id: str | os.PathLike[str], *, scalar: bool = False) -> ModelConfig:
    """The config of what ``from_pretrained`` (or, with ``scalar``, ``load_pretrained_scalar``) would read.

    Raises:
        InputError: as ``from_pretrained``.
    """
    return _open(path_or_hub_id, scalar=scalar)[1]


def save_pretrained(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a directory that transformers loads as the language model of the config's family.

    Files of the same name are replaced. The token ids go into config.json, where ``generate`` of transformers looks
    for them. dtype: ``float32``, ``bfloat16`` or ``float16``, what parameters are rounded to. max_shard_bytes: above
    it the weights are cut into several files with an index.

    Raises:
        InputError: the family cannot say what the model is, or ``dtype`` or ``max_shard_bytes`` is out of range.
    """
    family, fields = FAMILIES.get(config.family), config_to_huggingface(config)
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": pad_id, "dtype": dtype}
    head = None if config.tied_embeddings else family.heads[0]
    arrays = _tensors(config, family, params["decoder"])
    if head is not None:
        arrays[head] = lambda: np.asarray(params["decoder"]["unembedding"])
    _write(path, fields | ids, _tensor_shapes(config, family, head=head), arrays, dtype, max_shard_bytes)


def save_pretrained_scalar(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    offset: float = 0.0,
    bos_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a reward or value model as ``...ForSequenceClassification`` with one label.

    transformers' head has no bias, and behind an RMS norm there is no direction that a constant could hide in. What
    stands beside the kernel, the head's bias minus ``offset`` (the mean that a reward model's scores are shifted by),
    is therefore kept as ``score_bias`` in config.json: ``load_pretrained_scalar`` reads it, transformers does not, so
    its scores are ours minus ``score_bias``: the same order, the same differences. An untied vocabulary head is not
    part of such a model and is not written. transformers needs ``pad_id`` to score more than one row at once, and
    scores at the last token that is not ``pad_id``.

    Raises:
        InputError: as ``save_pretrained``.
    """
    config = dataclasses.replace(config, tied_embeddings=True)
    family, fields = FAMILIES.get(config.family), config_to_huggingface(config, scalar=True)
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": pad_id, "dtype": dtype}
    bias = float(np.float32(params["head"]["bias"]) - np.float32(offset))
    arrays = _tensors(config, family, params["decoder"])
    arrays[_SCORE] = lambda: np.asarray(params["head"]["kernel"])[None]
    shapes = _tensor_shapes(config, family, head=None) | {_SCORE: (1, config.width)}
    _write(path, fields | ids | {_SCORE_BIAS: bias}, shapes, arrays, dtype, max_shard_bytes)


def _open(
    path_or_hub_id: str | os.PathLike[str], *, scalar: bool
) -> tuple[pathlib.Path, ModelConfig, Family]:
    directory = local_directory(path_or_hub_id)
    file = directory / "config.json"
    fields = tensor_files.read_json(file, "give a directory that transformers or this project saved")
    try:
        config = config_from_huggingface(fields, scalar=scalar)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    if scalar:
        config = dataclasses.replace(config, tied_embeddings=True)
    return directory, config, FAMILIES[config.family]


def local_directory(path_or_hub_id: str | os.PathLike[str]) -> pathlib.Path:
    """The directory itself, or where a repository of the hub was fetched to; no code and no pickles are fetched.

    Raises:
        InputError: it is a URL; or there is no such directory, and no repository of that name can be reached.
    """
    directory = storage.local_path(path_or_hub_id)
    if directory.is_dir():
        return directory
    name = os.fspath(path_or_hub_id)
    if not _HUB_ID.fullmatch(name):
        raise InputError(
            f"model directory {name} is missing: give a Hugging Face directory that exists, or the name of a "
            "repository on the hub such as 'owner/name'"
        )
    # Imported where it is used: a run on local files needs no network library.
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (OSError, HFValidationError) as error:  # every failure of the hub's own is one of these
        reason = f"{type(error).__name__}: {' '.join(str(error).split()).partition('. ')[0]}"
        raise InputError(
            f"model {name} is neither a directory nor a repository of the Hugging Face hub that can be fetched "
            f"({reason}): give a directory, or fetch it where there is a network (hf download {name})"
        ) from None


def _by_leaf(shardings: Any, part: str) -> Callable[..., Any]:
    """A function from the names below ``part`` to the sharding of that array, or None."""

    def find(*names: str) -> Any:
        node = shardings
        for name in (part, *names):
            node = node[name] if isinstance(node, Mapping) else node
        return node

    return find


def _place(shape: tuple[int, ...], sharding: Any, read: Callable[[Index], np.ndarray]) -> jax.Array:
    """An array on its devices; ``read`` is called once for every distinct slice that devices of this process hold."""
    if sharding is None:
        return jnp.asarray(read(tuple(slice(0, size) for size in shape)))
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    pieces = []
    for bounds, devices in holders.items():
        block = read(tuple(slice(start, stop) for start, stop in bounds))
        pieces += [jax.device_put(block, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def _read_decoder(
    config: ModelConfig, family: Family, files: TensorFiles, head: str | None, where: Callable[..., Any]
) -> Params:
    shapes = parameter_shapes(config)["decoder"]
    decoder: Params = {}
    for ours, theirs in family.top.items():
        name = family.prefix + theirs
        decoder[ours] = _place(shapes[ours], where(ours), lambda index, name=name: files.read(name, index))
    decoder["layers"] = {}
    for ours, shape in shapes["layers"].items():

        def read(index: Index, stored: Stored = family.layers[ours]) -> np.ndarray:
            block = np.empty([s.stop - s.start for s in index], np.float32)
            for row, layer in enumerate(range(index[0].start, index[0].stop)):
                name = _layer_name(family, stored, layer)
                block[row] = _read_piece(config, files, name, stored, index[1:])
            return block

        decoder["layers"][ours] = _place(shape, where("layers", ours), read)
    if head is not None and not config.tied_embeddings:
        shape = shapes["unembedding"]
        decoder["unembedding"] = _place(shape, where("unembedding"), lambda index: files.read(head, index))
    elif head is not None and head in files:
        _check_tied(files, family, head, shapes["embedding"])
    return decoder


def _check_tied(files: TensorFiles, family: Family, head: str, shape: tuple[int, ...]) -> None:
    """Raises InputError where a vocabulary head that config.json says is the embedding is not."""
    embedding = family.prefix + family.top["embedding"]
    for start in range(0, shape[0], 4096):  # rows at a time, so that neither is held whole
        rows = (slice(start, min(start + 4096, shape[0])), slice(0, shape[1]))
        if not np.array_equal(files.read(head, rows), files.read(embedding, rows)):
            raise InputError(
                f"{files.directory}: tensor {head} differs from {embedding} although config.json ties them: set "
                "tie_word_embeddings to false"
            )


def _layer_name(family: Family, stored: Stored, layer: int) -> str:
    return family.prefix + family.layer.format(layer=layer) + stored.tensor


def _read_piece(
    config: ModelConfig, files: TensorFiles, name: str, stored: Stored, index: Index
) -> np.ndarray:
    """A slice of one layer's array, ours, out of their tensor."""
    if stored.layout == "same":
        return files.read(name, index)
    if stored.layout == "transposed":
        return files.read(name, index[::-1]).T
    return split_thirds(config, stored, files.read_whole(name))[index]


def split_thirds(config: ModelConfig, stored: Stored, whole: np.ndarray) -> np.ndarray:
    """Query, key or value [..., heads] out of the tensor that holds all three."""
    if stored.layout == "third_of_columns":
        return np.split(whole, 3, axis=-1)[stored.third]
    heads = whole.reshape(config.num_heads, 3, config.head_dim, *whole.shape[1:])[:, stored.third]
    return heads.reshape(-1, *whole.shape[1:]).T


def join_thirds(config: ModelConfig, stored: Stored, thirds: Sequence[np.ndarray]) -> np.ndarray:
    """The tensor that holds query, key and value [..., heads]: the inverse of ``split_thirds``."""
    if stored.layout == "third_of_columns":
        return np.concatenate(thirds, axis=-1)
    by_head = [x.T.reshape(config.num_heads, config.head_dim, *x.shape[:-1]) for x in thirds]
    return np.stack(by_head, axis=1).reshape(-1, *thirds[0].shape[:-1])


def _their_shape(stored: Stored, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the tensor in which an array of ours of ``shape`` lies."""
    if stored.layout == "third_of_columns":
        return (*shape[:-1], 3 * shape[-1])
    if stored.layout == "third_of_heads":
        return (3 * shape[-1], *shape[:-1])
    return shape[::-1] if stored.layout == "transposed" else shape


def _tensor_shapes(config: ModelConfig, family: Family, *, head: str | None) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, by its name there, in the order in which it is written."""
    shapes = parameter_shapes(config)["decoder"]
    table = {family.prefix + theirs: shapes[ours] for ours, theirs in family.top.items()}
    for layer in range(config.num_layers):
        for ours, shape in shapes["layers"].items():
            stored = family.layers[ours]
            table[_layer_name(family, stored, layer)] = _their_shape(stored, shape[1:])
    return table | ({} if head is None else {head: shapes["embedding"]})


def _tensors(config: ModelConfig, family: Family, decoder: Params) -> dict[str, Callable[[], np.ndarray]]:
    """What gives each tensor of a checkpoint when it is written, by its name there."""
    table = {
        family.prefix + theirs: lambda ours=ours: np.asarray(decoder[ours])
        for ours, theirs in family.top.items()
    }
    for layer in range(config.num_layers):
        for ours, stored in family.layers.items():
            if ours in decoder["layers"] and stored.third == 0:
                name = _layer_name(family, stored, layer)
                table[name] = lambda ours=ours, stored=stored, layer=layer: _their_tensor(
                    config, decoder["layers"], ours, stored, layer
                )
    return table


def _their_tensor(config: ModelConfig, layers: Params, ours: str, stored: Stored, layer: int) -> np.ndarray:
    array = np.asarray(layers[ours][layer])
    if stored.layout in ("same", "transposed"):
        return array if stored.layout == "same" else array.T
    ending = ours.removeprefix("query")
    thirds = [np.asarray(layers[f"{name}{ending}"][layer]) for name in ("query", "key", "value")]
    return join_thirds(config, stored, thirds)


def _write(
    path: str | os.PathLike[str],
    fields: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Mapping[str, Callable[[], np.ndarray]],
    dtype: str,
    max_shard_bytes: int,
) -> None:
    directory = pathlib.Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    tensor_files.write_tensors(
        directory, shapes, lambda name: arrays[name](), dtype=dtype, max_shard_bytes=max_shard_bytes
    )
    tensor_files.write_json(directory / "config.json", fields)
