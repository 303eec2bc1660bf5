"""Directories of safetensors, read piece by piece and written in shards; imports errors only.

Pickled weights are never opened. A reader gets slices of tensors, so that what a device holds can be read straight
from the file; a writer is handed tensors one at a time and holds one shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from rlhf_jax.errors import InputError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_FLOATS = ("F64", "F32", "F16", "BF16")
DTYPES: Mapping[str, Any] = {"float32": np.float32, "bfloat16": jnp.bfloat16, "float16": np.float16}

# What old exports kept beside the weights and the config implies: rotary wavelengths and causal masks.
_IMPLIED = (
    "rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)

# Heads stand outside of the model that a prefix names.
_HEADS = ("lm_head.", "embed_out.", "score.")

Shape = tuple[int, ...]


def read_json(file: pathlib.Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: the file is missing, not JSON, or not an object; ``remedy`` ends the sentence.
    """
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file} is missing: {remedy}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} is not JSON ({error}): {remedy}") from None
    if not isinstance(fields, dict):
        raise InputError(f"{file} holds a {type(fields).__name__}, not an object: {remedy}")
    return fields


class TensorFiles:
    """The tensors of a directory by name; ``prefix`` is put before names where a file leaves it out.

    weights: the file they are in; of the default's there may be shards and an index instead.

    Raises:
        InputError: no weights, pickled ones only, or a file that is not whole; the message names it.
    """

    def __init__(self, directory: pathlib.Path, prefix: str = "", weights: str = WEIGHTS) -> None:
        self.directory = directory
        found = _open_all(directory, weights)
        bare = prefix and not any(name.startswith(prefix) for name in found)
        self._files = {
            (prefix + name if bare and not name.startswith(_HEADS) else name): (name, *value)
            for name, value in found.items()
        }

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def check(self, expected: Mapping[str, Shape]) -> None:
        """Raises InputError unless the files hold exactly ``expected``: names to shapes, of any float dtype."""
        for name, shape in expected.items():
            if name not in self._files:
                raise InputError(
                    f"{self.directory} has no tensor {name}: give weights that belong to its config.json"
                )
            kept, file, handle = self._files[name]
            piece = handle.get_slice(kept)
            if tuple(piece.get_shape()) != shape:
                raise InputError(
                    f"{file}: tensor {name} has shape {tuple(piece.get_shape())} where config.json says {shape}: "
                    "give weights that belong to this config.json"
                )
            if piece.get_dtype() not in _FLOATS:
                raise InputError(
                    f"{file}: tensor {name} is {piece.get_dtype()}: give weights of one of {', '.join(_FLOATS)}"
                )
        extra = sorted(name for name in self._files if name not in expected and not name.endswith(_IMPLIED))
        if extra:
            raise InputError(
                f"{self._files[extra[0]][1]}: {len(extra)} tensor(s) have no place in the model, first "
                f"{extra[0]}: give weights that belong to this config.json"
            )

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor as float32, without reading the rest."""
        kept, _, handle = self._files[name]
        return handle.get_slice(kept)[index].astype(np.float32)

    def read_whole(self, name: str) -> np.ndarray:
        """A whole tensor as float32."""
        kept, _, handle = self._files[name]
        return handle.get_tensor(kept).astype(np.float32)


def _open_all(directory: pathlib.Path, weights: str) -> dict[str, tuple[pathlib.Path, Any]]:
    """Tensor name -> (file, open handle) over every weight file of the directory."""
    found: dict[str, tuple[pathlib.Path, Any]] = {}
    files = _weight_files(directory, weights)
    for file in files:
        try:
            handle = safetensors.safe_open(file, framework="numpy")
        except FileNotFoundError:
            raise InputError(
                f"{file} is named by {INDEX} and missing: download the checkpoint again"
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


def _weight_files(directory: pathlib.Path, weights: str) -> list[pathlib.Path]:
    index = directory / INDEX
    if (directory / weights).is_file():
        return [directory / weights]
    if weights == WEIGHTS and index.is_file():
        shards = read_json(index, "download the checkpoint again").get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(x, str) for x in shards.values()):
            raise InputError(f"{index} has no weight_map of file names: download the checkpoint again")
        return [directory / name for name in sorted(set(shards.values()))]
    pickled = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in directory.glob(kind))
    if pickled:
        raise InputError(
            f"{directory / pickled[0]} is pickled, which can run code when opened, and is refused: save "
            "the model again as safetensors (transformers does so by default)"
        )
    shards = f", or {INDEX} with its shards" if weights == WEIGHTS else ""
    raise InputError(f"{directory} has no weights: add {weights}{shards}")


def write_tensors(
    directory: pathlib.Path,
    shapes: Mapping[str, Shape],
    tensor: Callable[[str], np.ndarray],
    *,
    dtype: str,
    max_shard_bytes: int,
) -> None:
    """Writes tensors by name, in the order of ``shapes``, into files of at most ``max_shard_bytes`` each.

    ``tensor`` gives one by its name; as many are held at a time as a shard has. A tensor larger than a shard gets one
    of its own. Weight files that an earlier save left in the directory are removed once the new ones are whole.

    Raises:
        InputError: ``dtype`` is unknown or ``max_shard_bytes`` not above 0.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}: give one of {', '.join(DTYPES)}")
    if max_shard_bytes < 1:
        raise InputError(f"max_shard_bytes is {max_shard_bytes}: give at least 1")
    itemsize = np.dtype(DTYPES[dtype]).itemsize
    sizes = {name: int(np.prod(shape)) * itemsize for name, shape in shapes.items()}
    shards = _shards(sizes, max_shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [WEIGHTS]
    # Whole files under temporary names first: a reader never sees half a file.
    for file, shard in zip(names, shards, strict=True):
        held = {name: np.ascontiguousarray(tensor(name)).astype(DTYPES[dtype]) for name in shard}
        _save_partial(directory / file, held)
    for file in names:
        _replace_by_partial(directory / file)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(directory / INDEX, index)
        names = [*names, INDEX]
    for stale in directory.glob("model*"):
        known = stale.name in (WEIGHTS, INDEX) or _SHARD.fullmatch(stale.name)
        if known and stale.name not in names:
            stale.unlink()


def _shards(sizes: Mapping[str, int], max_shard_bytes: int) -> Sequence[Sequence[str]]:
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def write_file(file: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes float32 tensors into one file, whole or not at all."""
    _save_partial(file, {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()})
    _replace_by_partial(file)


def write_json(file: pathlib.Path, fields: Mapping[str, Any]) -> None:
    """Writes an object, whole or not at all."""
    file.with_name(f"{file.name}.partial").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    _replace_by_partial(file)


def _save_partial(file: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    # transformers refuses a file whose metadata does not say which framework's layout it has.
    safetensors.numpy.save_file(tensors, file.with_name(f"{file.name}.partial"), metadata={"format": "pt"})


def _replace_by_partial(file: pathlib.Path) -> None:
    os.replace(file.with_name(f"{file.name}.partial"), file)


_SAMPLE, _SAMPLES = 1 << 16, 16


def fingerprint(directory: str | os.PathLike) -> str | None:
    """SHA-256 of samples of a directory's weights, or None where it holds none.

    Names, sizes, headers and sixteen pieces of 64 KiB of every file: other weights give another one, and 100 GB take no
    longer than 1.
    """
    files = sorted(pathlib.Path(directory).glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in np.linspace(0, max(size - _SAMPLE, 0), _SAMPLES).astype(int):
                file.seek(int(place))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
