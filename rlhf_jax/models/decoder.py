"""The decoder: parameters, hidden states and logits; imports errors and models below it.

Parameters are a plain nested dict of float32 arrays, ``{"decoder": {...}}``, with every layer's arrays
stacked on a leading axis. Underneath is Flax Linen with the layers under ``nn.scan``; ``logical_axes`` gives
the name of every axis of every parameter for a sharding table to map onto a mesh.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.errors import InputError
from rlhf_jax.models import attention, kernels, parts
from rlhf_jax.models.attention import causal_attention, causal_mask
from rlhf_jax.models.config import ModelConfig

Params = dict[str, Any]


def _layer_parameters(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[str, ...], Any]]:
    """Name -> (shape, logical axes, initialiser) of one layer: the one table of what a layer holds.

    Kernels start at N(0, 1/fan_in); those that write to the residual stream are smaller by sqrt(2 layers), so
    that its variance does not grow with depth (Radford et al. 2019). Norms start as the identity, biases at 0.
    """
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    width, mlp = config.width, config.mlp_width
    residual = (2 * config.num_layers) ** -0.5
    around_attention = {
        "query": ((width, heads), ("embed", "heads"), width**-0.5, config.qkv_bias),
        "key": ((width, kv_heads), ("embed", "kv_heads"), width**-0.5, config.qkv_bias),
        "value": ((width, kv_heads), ("embed", "kv_heads"), width**-0.5, config.qkv_bias),
        "output": ((heads, width), ("heads", "embed"), residual * heads**-0.5, config.output_bias),
    }
    gate = (
        {"gate": ((width, mlp), ("embed", "mlp"), width**-0.5, config.mlp_bias)} if config.gated_mlp else {}
    )
    in_mlp = gate | {
        "up": ((width, mlp), ("embed", "mlp"), width**-0.5, config.mlp_bias),
        "down": ((mlp, width), ("mlp", "embed"), residual * mlp**-0.5, config.mlp_bias),
    }
    # Linen draws in the order of declaration: what every model has comes first, so that a key goes on giving the
    # weights it gave before there was anything else.
    table, biases = {}, {}
    for norm, kernels_after in (("attention_norm", around_attention), ("mlp_norm", in_mlp)):
        table[norm] = ((width,), ("embed",), _norm_initializer(config))
        for name, (shape, axes, deviation, bias) in kernels_after.items():
            table[name] = (shape, axes, nn.initializers.normal(deviation))
            if bias:
                biases[f"{name}_bias"] = (shape[1:], axes[1:], nn.initializers.zeros_init())
    table |= biases
    for name in ("attention_norm", "mlp_norm"):
        table |= _norm_parameters(config, name)
    if config.post_norms:
        table |= _norm_parameters(config, "attention_post_norm") | _norm_parameters(config, "mlp_post_norm")
    if config.query_key_norms:
        for name in ("query_norm", "key_norm"):
            table[name] = ((config.head_dim,), ("head_dim",), _norm_initializer(config))
    return table


def _norm_initializer(config: ModelConfig) -> Any:
    return nn.initializers.zeros_init() if config.zero_centred_norms else nn.initializers.ones_init()


def _norm_parameters(
    config: ModelConfig, name: str
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...], Any]]:
    """The rows of the table for one norm over the residual stream."""
    table = {name: ((config.width,), ("embed",), _norm_initializer(config))}
    if config.norm == "layer":
        table[f"{name}_bias"] = ((config.width,), ("embed",), nn.initializers.zeros_init())
    return table


class Shared(NamedTuple):
    """What every layer reads beside its input; of a pair, the second is for layers with a window.

    rotations: see ``parts.rotations``. masks: [B, S, S] bool each. segments: [B, S] int, of which padding has its own.
    """

    rotations: tuple[parts.Rotation | None, ...]
    masks: tuple[jax.Array, ...]
    segments: jax.Array


class Layer(nn.Module):
    """Declares the parameters of ``parts.layer`` and applies it to [B, S, D]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, shared: Shared, windowed: jax.Array) -> tuple[jax.Array, None]:
        config = self.config
        params = {
            name: self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
            for name, (shape, axes, init) in _layer_parameters(config).items()
        }
        # Adapters (models.lora) come beside the parameters and are declared by whoever made them.
        added = [f"{name}_{part}" for name in params for part in ("lora_in", "lora_out")]
        params |= {
            name: self.get_variable("params", name) for name in added if self.has_variable("params", name)
        }

        def mine(pair: tuple[Any, ...]) -> Any:
            if len(pair) == 1:
                return pair[0]
            return jax.tree.map(lambda everywhere, local: jnp.where(windowed, local, everywhere), *pair)

        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, None]:
            heads, scale, softcap = (query, key, value), config.score_scale, config.attention_softcap
            if config.attention == "splash":
                windows = tuple(dict.fromkeys(config.window if w else None for w in config.windowed))
                rows, kv_heads = nn.logical_to_mesh_axes(("batch", "kv_heads"))
                mixed = kernels.splash_attention(
                    *heads,
                    shared.segments,
                    scale=scale,
                    softcap=softcap,
                    windows=windows,
                    which=windowed,
                    row_axes=rows,
                    head_axes=kv_heads,
                )
            elif config.attention == "own":
                mixed = causal_attention(*heads, mine(shared.masks), scale=scale, softcap=softcap)
            else:
                mixed = kernels.dot_product_attention(
                    *heads, mine(shared.masks), scale=scale, implementation=config.attention
                )
            return mixed, None

        x, _ = parts.layer(config, params, x, mine(shared.rotations), attend)
        return nn.with_logical_constraint(x, ("batch", "length", "activation_embed")), None


class Decoder(nn.Module):
    """Tokens [B, S] to final-normed hidden states [B, S, D]; the unembedding is a parameter that is not
    applied."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, tokens: jax.Array, token_mask: jax.Array, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        config = self.config
        top = {
            name: self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
            for name, (shape, axes, init) in _top_parameters(config).items()
        }
        positions = parts.positions_from_mask(token_mask, segment_ids)
        x = embed(config, top, tokens, token_mask, positions)
        shared = _shared(config, token_mask, segment_ids, positions)

        kept = () if config.remat == "full" else attention.KEPT + parts.KEPT
        policy = jax.checkpoint_policies.save_only_these_names(*kept)
        # Inside a scan nothing can merge the second computation with the first, so no barrier is needed.
        body = nn.remat(Layer, prevent_cse=False, policy=policy)
        layers = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(config, name="layers")(x, shared, jnp.asarray(config.windowed))
        return parts.norm(config, top, "final_norm", x)


def _top_parameters(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[str, ...], Any]]:
    """As ``_layer_parameters``, for what is not in a layer."""
    vocabulary = ((config.vocab_size, config.width), ("vocab", "embed"), nn.initializers.normal(0.02))
    table = {"embedding": vocabulary}
    if config.positions == "learned":
        shape = (config.max_length, config.width)
        table["position_embedding"] = (shape, ("position", "embed"), nn.initializers.normal(0.02))
    if not config.tied_embeddings:
        table["unembedding"] = vocabulary
    return table | _norm_parameters(config, "final_norm")


def _shared(
    config: ModelConfig, token_mask: jax.Array, segment_ids: jax.Array | None, positions: jax.Array
) -> Shared:
    kinds = sorted(set(config.windowed))  # layers without a window come first
    windows = [config.window if windowed else None for windowed in kinds]
    segments = jnp.ones_like(positions) if segment_ids is None else segment_ids
    return Shared(
        rotations=parts.rotations(config, positions),
        masks=tuple(causal_mask(token_mask, segment_ids, window=window) for window in windows),
        segments=jnp.where(token_mask, segments, jnp.min(segments) - 1),
    )


def embed(
    config: ModelConfig,
    tables: Mapping[str, jax.Array],
    tokens: jax.Array,
    token_mask: jax.Array,
    positions: jax.Array,
) -> jax.Array:
    """tokens, token_mask, positions [B, S] -> [B, S, D] in the compute dtype; padding reads row 0, whatever id
    it carries. ``tables`` holds ``embedding`` and, where positions are learned, ``position_embedding``."""
    x = _look_up(tables["embedding"], jnp.where(token_mask, tokens, 0))
    if config.scaled_embeddings:
        x = x * config.width**0.5
    if config.positions == "learned":
        x = x + jnp.take(tables["position_embedding"], jnp.where(token_mask, positions, 0), axis=0)
    return x.astype(config.compute_dtype)


def _look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows [B, S, D] of the embedding [V, D].

    Where a mesh splits the vocabulary, each device looks up the ids that it holds, at full width, and the parts are
    summed (Shoeybi et al. 2019, section 3). Left to itself XLA gathers the whole vocabulary where the width is split
    too. Where the width alone is split its own way is kept: a part of every row, exchanged afterwards.

    A vocabulary that ``tensor`` does not divide (GPT-2's 50,257 is odd) is left to XLA. Where fsdp splits the width, it
    then gathers rows of the whole batch on every device: a part of their width, or, where there is ``data`` too, all of
    it, and warns of an "involuntary full rematerialization". To gather the table instead would cost less there and more
    without ``data``. Where it counts, take a mesh without ``tensor``.
    """
    axes = jax.tree.leaves(tuple(nn.logical_to_mesh_axes(("vocab",))))
    split = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)
    if split > 1 and table.shape[0] % split == 0:
        table = nn.with_logical_constraint(table, ("vocab", "activation_embed"))
    return jnp.take(table, ids, axis=0)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters ``{"decoder": {...}}``, float32, from a typed PRNG key."""
    return {"decoder": nn.unbox(_init_variables(config, key)["params"])}


def _init_variables(config: ModelConfig, key: jax.Array) -> Any:
    shape = (1, 2)
    # No parameter depends on who computes attention, and some of them take no rows of two columns.
    config = dataclasses.replace(config, attention="own")
    return Decoder(config).init(key, jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool))


def parameter_shapes(config: ModelConfig) -> Params:
    """The tree of ``init_params`` with a shape, a tuple of ints, at every leaf; allocates nothing."""
    abstract = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf.shape, abstract)


def layer_axes(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Name -> (shape, logical axes) of every parameter of one layer, without the axis of layers."""
    return {name: (shape, axes) for name, (shape, axes, _) in _layer_parameters(config).items()}


def logical_axes(config: ModelConfig) -> Params:
    """The tree of ``init_params`` with a ``PartitionSpec`` of logical names at every leaf; allocates nothing.

    Names: vocab, position, embed, heads, kv_heads, head_dim, mlp, layers.
    """
    boxed = jax.eval_shape(lambda key: _init_variables(config, key), jax.random.key(0))
    return {"decoder": nn.get_partition_spec(boxed)["params"]}


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    token_mask: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Final-normed hidden states [B, S, D] in the compute dtype; column s has seen columns up to s.

    tokens: [B, S] int32. token_mask: [B, S] bool, False on padding, which no token attends to and no position
    counts. segment_ids: [B, S] int, where rows are packed: tokens see their own segment only, whose positions
    start at 0. States of padding columns are finite and mean nothing. Where positions are learned, a token whose
    position is ``max_length`` or more has NaN for its state.

    Raises:
        InputError: positions are learned, and rows that are not packed have more columns than ``max_length``.
    """
    if config.positions == "learned" and segment_ids is None and tokens.shape[1] > config.max_length:
        raise InputError(
            f"rows of {tokens.shape[1]} columns do not fit a model with {config.max_length} learned positions: "
            "give shorter prompts and responses"
        )
    return Decoder(config).apply({"params": params["decoder"]}, tokens, token_mask, segment_ids)


def unembedding(config: ModelConfig, params: Params) -> jax.Array:
    """The vocabulary head [V, D] float32, the embedding itself when tied.

    Logits are products with it, capped where the config has a ``logit_softcap``: see ``vocabulary_logits``.
    """
    return params["decoder"]["embedding" if config.tied_embeddings else "unembedding"]


def logits(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    token_mask: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Next-token logits [B, S, V] float32 for tokens, token_mask [B, S]; see ``hidden_states``."""
    hidden = hidden_states(config, params, tokens, token_mask, segment_ids=segment_ids)
    return vocabulary_logits(hidden, unembedding(config, params), softcap=config.logit_softcap)


def vocabulary_logits(hidden: jax.Array, head: jax.Array, *, softcap: float | None = None) -> jax.Array:
    """[..., D] hidden states and a [V, D] head -> [..., V] float32 logits; ``softcap`` is the model's
    ``logit_softcap``."""
    product = jnp.einsum(
        "...d,vd->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    return attention.capped(product.astype(jnp.float32), softcap)
