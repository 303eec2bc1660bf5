"""Scalar heads for rewards and values; imports rlhf_jax.models.{config,decoder} only.

A reward or value model is a parameter dict ``{"decoder": ..., "head": {"kernel": [D], "bias": []}}``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.decoder import Params


def init_scalar_head(config: ModelConfig, key: jax.Array) -> Params:
    """A reward head: kernel N(0, 1/(D+1)), that is standard deviation 1/sqrt(D+1), and bias 0 (Stiennon et
    al. 2020)."""
    kernel = jax.random.normal(key, (config.width,), jnp.float32) * (config.width + 1) ** -0.5
    return {"kernel": kernel, "bias": jnp.zeros((), jnp.float32)}


def zero_scalar_head(config: ModelConfig) -> Params:
    """A head that answers 0 everywhere: a value model before its first update."""
    return {"kernel": jnp.zeros((config.width,), jnp.float32), "bias": jnp.zeros((), jnp.float32)}


def scalar_head_axes() -> Params:
    """Logical axis names of a scalar head, in the tree of ``init_scalar_head``."""
    return {"kernel": jax.sharding.PartitionSpec("embed"), "bias": jax.sharding.PartitionSpec()}


def scalar_head(head: Params, hidden: jax.Array) -> jax.Array:
    """[B, S, D] hidden states -> [B, S] float32."""
    return jnp.einsum("...d,d->...", hidden.astype(jnp.float32), head["kernel"]) + head["bias"]


def last_token_values(values: jax.Array, token_mask: jax.Array) -> jax.Array:
    """The value at the last real token of each row: [B, S], [B, S] bool -> [B]; a row without tokens gives
    0."""
    from_end = jnp.argmax(token_mask[:, ::-1], axis=1)
    last = token_mask.shape[1] - 1 - from_end
    picked = jnp.take_along_axis(values, last[:, None], axis=1)[:, 0]
    return jnp.where(jnp.any(token_mask, axis=1), picked, 0)
