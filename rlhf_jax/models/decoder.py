"""The decoder: parameters, hidden states and logits; imports rlhf_jax.models.{config,parts} only.

Parameters are a plain nested dict of float32 arrays, ``{"decoder": {...}}``, with every layer's arrays
stacked on a leading axis. Underneath is Flax Linen with the layers under ``nn.scan``; ``logical_axes`` gives
the name of every axis of every parameter for a sharding table to map onto a mesh.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.models import attention, parts
from rlhf_jax.models.attention import causal_attention, causal_mask
from rlhf_jax.models.config import ModelConfig

Params = dict[str, Any]


def _layer_parameters(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[str, ...], Any]]:
    """Name -> (shape, logical axes, initialiser) of one layer: the one table of what a layer holds.

    Kernels start at N(0, 1/fan_in); those that write to the residual stream are smaller by sqrt(2 layers), so
    that its variance does not grow with depth (Radford et al. 2019).
    """
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    width, mlp = config.width, config.mlp_width
    residual = (2 * config.num_layers) ** -0.5
    return {
        "attention_norm": ((width,), ("embed",), nn.initializers.ones_init()),
        "query": ((width, heads), ("embed", "heads"), nn.initializers.normal(width**-0.5)),
        "key": ((width, kv_heads), ("embed", "kv_heads"), nn.initializers.normal(width**-0.5)),
        "value": ((width, kv_heads), ("embed", "kv_heads"), nn.initializers.normal(width**-0.5)),
        "output": ((heads, width), ("heads", "embed"), nn.initializers.normal(residual * heads**-0.5)),
        "mlp_norm": ((width,), ("embed",), nn.initializers.ones_init()),
        "gate": ((width, mlp), ("embed", "mlp"), nn.initializers.normal(width**-0.5)),
        "up": ((width, mlp), ("embed", "mlp"), nn.initializers.normal(width**-0.5)),
        "down": ((mlp, width), ("mlp", "embed"), nn.initializers.normal(residual * mlp**-0.5)),
    }


class Layer(nn.Module):
    """Declares the parameters of ``parts.layer`` and applies it to [B, S, D]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, cos_sin: parts.Rotation, mask: jax.Array) -> tuple[jax.Array, None]:
        params = {
            name: self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
            for name, (shape, axes, init) in _layer_parameters(self.config).items()
        }

        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, None]:
            return causal_attention(query, key, value, mask), None

        x, _ = parts.layer(self.config, params, x, cos_sin, attend)
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
        embed_init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        embedding = self.param("embedding", embed_init, (config.vocab_size, config.width), jnp.float32)
        if not config.tied_embeddings:
            self.param("unembedding", embed_init, (config.vocab_size, config.width), jnp.float32)
        x = embed(config, embedding, tokens, token_mask)
        positions = parts.positions_from_mask(token_mask, segment_ids)
        cos_sin = parts.rotation(positions, config.head_dim, config.rope_theta)
        mask = causal_mask(token_mask, segment_ids)

        kept = () if config.remat == "full" else attention.KEPT + parts.KEPT
        policy = jax.checkpoint_policies.save_only_these_names(*kept)
        # Inside a scan nothing can merge the second computation with the first, so no barrier is needed.
        body = nn.remat(Layer, prevent_cse=False, policy=policy)
        layers = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(config, name="layers")(x, cos_sin, mask)
        scale_init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",))
        scale = self.param("final_norm", scale_init, (config.width,), jnp.float32)
        return parts.rms_norm(x, scale, config.norm_epsilon)


def embed(config: ModelConfig, embedding: jax.Array, tokens: jax.Array, token_mask: jax.Array) -> jax.Array:
    """[B, S] -> [B, S, D] in the compute dtype; padding reads row 0, whatever id it carries."""
    ids = jnp.where(token_mask, tokens, 0)
    return jnp.take(embedding, ids, axis=0).astype(config.compute_dtype)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters ``{"decoder": {...}}``, float32, from a typed PRNG key."""
    return {"decoder": nn.unbox(_init_variables(config, key)["params"])}


def _init_variables(config: ModelConfig, key: jax.Array) -> Any:
    shape = (1, 2)
    return Decoder(config).init(key, jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool))


def parameter_shapes(config: ModelConfig) -> Params:
    """The tree of ``init_params`` with a shape, a tuple of ints, at every leaf; allocates nothing."""
    abstract = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf.shape, abstract)


def logical_axes(config: ModelConfig) -> Params:
    """The tree of ``init_params`` with a ``PartitionSpec`` of logical names at every leaf; allocates nothing.

    Names: vocab, embed, heads, kv_heads, mlp, layers.
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
    start at 0. States of padding columns are finite and mean nothing.
    """
    return Decoder(config).apply({"params": params["decoder"]}, tokens, token_mask, segment_ids)


def unembedding(config: ModelConfig, params: Params) -> jax.Array:
    """The vocabulary head [V, D] float32: the embedding itself when tied."""
    return params["decoder"]["embedding" if config.tied_embeddings else "unembedding"]


def logits(config: ModelConfig, params: Params, tokens: jax.Array, token_mask: jax.Array) -> jax.Array:
    """Next-token logits [B, S, V] float32 for tokens, token_mask [B, S]."""
    hidden = hidden_states(config, params, tokens, token_mask)
    return vocabulary_logits(hidden, unembedding(config, params))


def vocabulary_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """[..., D] hidden states and a [V, D] head -> [..., V] float32 logits."""
    product = jnp.einsum(
        "...d,vd->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    return product.astype(jnp.float32)
