"""The shape of a decoder as one frozen value; imports rlhf_jax.errors only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rlhf_jax.errors import InputError

_SIZES = (
    "vocab_size",
    "width",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "mlp_width",
    "max_length",
)
_COMPUTE_DTYPES = ("float32", "bfloat16")
_REMAT = ("none", "full")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A pre-norm decoder with rotary positions, grouped-query attention and a gated SiLU MLP (Llama).

    vocab_size: rows of the embedding. width: the residual stream. num_layers, num_heads, num_kv_heads,
    head_dim, mlp_width: as named; ``num_heads`` is a multiple of ``num_kv_heads``. max_length: tokens the
    model was made for, prompt and response together. rope_theta: base of the rotary wavelengths.
    norm_epsilon: added to the mean square before the root. tied_embeddings: whether the unembedding is the
    embedding. compute_dtype: ``float32`` or ``bfloat16`` for matrix products and activations; parameters,
    norms, softmax and logits stay float32. remat: what the backward pass computes again; ``none`` keeps
    every matrix product and repeats elementwise work and attention weights only, ``full`` keeps the input of
    each layer and repeats the layer.

    Raises:
        InputError: a field is out of range; the message names it.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    max_length: int
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-5
    tied_embeddings: bool = True
    compute_dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"model field {name} is {value!r}: give a whole number of at least 1")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"model field num_kv_heads is {self.num_kv_heads}, which does not divide num_heads "
                f"{self.num_heads}: give a divisor of num_heads"
            )
        if self.head_dim % 2:
            raise InputError(f"model field head_dim is {self.head_dim}: rotary positions need an even number")
        for name in ("rope_theta", "norm_epsilon"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
                raise InputError(f"model field {name} is {value!r}: give a number above 0")
        if not isinstance(self.tied_embeddings, bool):
            raise InputError(f"model field tied_embeddings is {self.tied_embeddings!r}: give True or False")
        for name, choices in (("compute_dtype", _COMPUTE_DTYPES), ("remat", _REMAT)):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"model field {name} is {getattr(self, name)!r}: give one of {', '.join(choices)}"
                )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values; ``from_dict`` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """A config from ``to_dict``'s mapping.

        Raises:
            InputError: a field is unknown, missing or out of range.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise InputError(
                f"model field {unknown[0]} is not known: take it out, or use a version that has it"
            )
        missing = [name for name in _SIZES if name not in fields]
        if missing:
            raise InputError(f"model field {missing[0]} is missing: give a whole number of at least 1")
        return cls(**fields)
