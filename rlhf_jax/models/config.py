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
_CHOICES = {
    "compute_dtype": ("float32", "bfloat16"),
    "remat": ("none", "full"),
    "attention": ("own", "xla", "cudnn", "splash"),
    "norm": ("rms", "layer"),
    "activation": ("silu", "gelu", "gelu_tanh", "relu"),
    "positions": ("rotary", "learned"),
    "rope_scaling": ("none", "linear", "llama3"),
}
_FLAGS = (
    "tied_embeddings",
    "zero_centred_norms",
    "post_norms",
    "query_key_norms",
    "parallel_residual",
    "gated_mlp",
    "qkv_bias",
    "output_bias",
    "mlp_bias",
    "scaled_embeddings",
)
_POSITIVE = (
    "rope_theta",
    "norm_epsilon",
    "rope_factor",
    "rope_low_frequency_factor",
    "rope_high_frequency_factor",
    "rope_original_length",
    "local_rope_theta",
    "query_pre_attn_scalar",
    "attention_softcap",
    "logit_softcap",
    "window",
)
_MAY_BE_NONE = ("local_rope_theta", "query_pre_attn_scalar", "attention_softcap", "logit_softcap", "window")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder; with every default it is Llama: pre-norm, rotary positions, a gated SiLU MLP, no biases.

    vocab_size: rows of the embedding. width: the residual stream. num_layers, num_heads, num_kv_heads,
    head_dim, mlp_width: as named; ``num_heads`` is a multiple of ``num_kv_heads``. max_length: tokens the
    model was made for, prompt and response together. tied_embeddings: whether the unembedding is the
    embedding. family: whose names its tensors carry in a Hugging Face checkpoint; nothing is computed from it.

    Norms: norm: ``rms`` (a scale) or ``layer`` (a mean taken off, a scale and a bias). norm_epsilon: added to
    the mean square before the root. zero_centred_norms: scales are kept minus 1. post_norms: the outputs of
    attention and MLP are normed too, before they join the residual stream. query_key_norms: queries and keys
    are RMS-normed a head. Layer: parallel_residual: attention and MLP read the same residual stream and are
    added together. gated_mlp: act(gate(x)) * up(x), else act(up(x)). activation: ``silu``, ``gelu`` (exact),
    ``gelu_tanh``, ``relu``. qkv_bias, output_bias, mlp_bias: which projections have biases. scaled_embeddings:
    embeddings are multiplied by the root of ``width``.

    Positions: positions: ``rotary``, or ``learned`` with a table of ``max_length`` rows. rope_theta: base of
    the rotary wavelengths. rotary_fraction: share of ``head_dim`` that is turned, the first dimensions.
    rope_scaling: ``linear`` divides all frequencies by rope_factor; ``llama3`` the low ones only, smoothly
    between rope_low_frequency_factor and rope_high_frequency_factor turns in rope_original_length tokens.

    Attention: query_pre_attn_scalar: scores are divided by its root; None: by that of ``head_dim``.
    attention_softcap: scores s become cap * tanh(s / cap). window: in layers with a window, how many tokens,
    itself included, a token sees. window_pattern: which layers have it, repeated over the depth.
    local_rope_theta: base of the rotary wavelengths of those layers, never scaled; None: as the others.
    logit_softcap: as attention_softcap, on the vocabulary's logits. attention: who computes it when there is no
    cache: ``own`` (fast on CPU), ``xla`` or ``cudnn`` (``jax.nn.dot_product_attention``), ``splash`` (TPU).

    compute_dtype: ``float32`` or ``bfloat16`` for matrix products and activations; parameters, norms, softmax
    and logits stay float32. remat: what the backward pass computes again; ``none`` keeps every matrix product
    and repeats elementwise work and attention weights only, ``full`` keeps the input of each layer and repeats
    the layer.

    Raises:
        InputError: a field is out of range, or two contradict each other; the message names them.
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
    family: str = "llama"
    norm: str = "rms"
    zero_centred_norms: bool = False
    post_norms: bool = False
    query_key_norms: bool = False
    parallel_residual: bool = False
    gated_mlp: bool = True
    activation: str = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    scaled_embeddings: bool = False
    positions: str = "rotary"
    rotary_fraction: float = 1.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_low_frequency_factor: float = 1.0
    rope_high_frequency_factor: float = 4.0
    rope_original_length: int = 8192
    local_rope_theta: float | None = None
    query_pre_attn_scalar: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    window: int | None = None
    window_pattern: tuple[bool, ...] = (True,)
    attention: str = "own"

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"model field {name} is {value!r}: give a whole number of at least 1")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise InputError(f"model field {name} is {value!r}: give a number above 0")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"model field {name} is {getattr(self, name)!r}: give True or False")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(
                    f"model field {name} is {getattr(self, name)!r}: give one of {', '.join(choices)}"
                )
        pattern = self.window_pattern
        if not isinstance(pattern, tuple) or not pattern or not all(isinstance(x, bool) for x in pattern):
            raise InputError(
                f"model field window_pattern is {pattern!r}: give a tuple of at least one True or False"
            )
        if self.window is not None and not isinstance(self.window, int):
            raise InputError(f"model field window is {self.window!r}: give a whole number of tokens, or None")
        self._check_together()

    def _check_together(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"model field num_kv_heads is {self.num_kv_heads}, which does not divide num_heads "
                f"{self.num_heads}: give a divisor of num_heads"
            )
        if not isinstance(self.rotary_fraction, int | float) or not 0 < self.rotary_fraction <= 1:
            raise InputError(
                f"model field rotary_fraction is {self.rotary_fraction!r}: give a number above 0 and at most 1"
            )
        if self.positions == "rotary" and (self.rotary_dim % 2 or not self.rotary_dim):
            raise InputError(
                f"model field head_dim is {self.head_dim}, of which rotary positions turn {self.rotary_dim}: "
                "they need an even number of at least 2"
            )
        if self.rope_scaling == "llama3" and (
            self.rope_high_frequency_factor <= self.rope_low_frequency_factor
        ):
            raise InputError(
                f"model field rope_high_frequency_factor is {self.rope_high_frequency_factor}: give more than "
                f"rope_low_frequency_factor, {self.rope_low_frequency_factor}"
            )
        if self.attention in ("xla", "cudnn") and self.attention_softcap is not None:
            raise InputError(
                f"model field attention is {self.attention!r}, which does not compute attention_softcap "
                f"({self.attention_softcap}): give 'own' or 'splash'"
            )
        if self.attention == "cudnn" and self.compute_dtype != "bfloat16":
            raise InputError(
                f"model field attention is 'cudnn', which does not compute in {self.compute_dtype}: set compute_dtype "
                "to bfloat16, or attention to 'xla'"
            )

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are turned by its position."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def score_scale(self) -> float:
        """What a product of query and key is multiplied by."""
        return (self.head_dim if self.query_pre_attn_scalar is None else self.query_pre_attn_scalar) ** -0.5

    @property
    def windowed(self) -> tuple[bool, ...]:
        """For each layer, whether its tokens see a window only."""
        pattern = self.window_pattern if self.window is not None else (False,)
        return tuple(pattern[i % len(pattern)] for i in range(self.num_layers))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values; ``from_dict`` is its inverse."""
        return dataclasses.asdict(self) | {"window_pattern": list(self.window_pattern)}

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
        fields = dict(fields)
        if isinstance(fields.get("window_pattern"), list):  # what JSON makes of a tuple
            fields["window_pattern"] = tuple(fields["window_pattern"])
        return cls(**fields)
