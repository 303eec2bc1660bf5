"""Attention by a platform's own kernels, in the place of ``attention.causal_attention``; imports jax and errors only.

``jax.nn.dot_product_attention`` (XLA's fusion, or cuDNN's flash attention on a GPU) and Pallas' splash kernel (TPU).
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from rlhf_jax.errors import InputError

MeshAxes = str | tuple[str, ...] | None

# Rows and columns of a splash block; what is cut into them must be a multiple.
SPLASH_BLOCK = 128


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    implementation: Literal["xla", "cudnn"],
) -> jax.Array:
    """As ``causal_attention``: [B, S, H, K], [B, S, J, K] twice, mask [B, S, S] -> [B, S, H, K]."""
    inputs = (checkpoint_name(x, "attention_inputs") for x in (query, key, value))
    mixed = jax.nn.dot_product_attention(
        *inputs, mask=mask[:, None], scale=scale, implementation=implementation
    )
    return checkpoint_name(mixed, "attention_output")


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    windows: tuple[int | None, ...],
    which: jax.Array,
    row_axes: MeshAxes = None,
    head_axes: MeshAxes = None,
    interpret: bool = False,
) -> jax.Array:
    """As ``causal_attention``, where tokens of one segment see each other: a mask is never held.

    query [B, S, H, K]; key, value [B, S, J, K]; segments [B, S] int, of which padding has its own. windows, in
    columns: one, or the two that the model has; of two, ``which`` ([] bool) picks the one that is not None. row_axes,
    head_axes: the axes of the mesh in scope (``jax.set_mesh``) over which rows and heads are split: XLA cannot split
    this kernel by itself. interpret: run the kernel's program without a TPU, slowly.

    Raises:
        InputError: S is not a multiple of 128.
    """
    length = query.shape[1]
    if length % SPLASH_BLOCK:
        raise InputError(
            f"model field attention is 'splash' and rows have {length} columns: give prompt and response lengths "
            f"whose sum is a multiple of {SPLASH_BLOCK}, or attention='xla'"
        )
    heads = [checkpoint_name(jnp.swapaxes(x, 1, 2), "attention_inputs") for x in (query * scale, key, value)]
    local = max(windows, key=lambda window: window is not None)

    def attend(window: int | None, heads: list[jax.Array], segments: jax.Array) -> jax.Array:
        kernel = _splash_kernel(heads[0].shape[1], length, window, softcap, interpret)
        return jax.vmap(kernel)(*heads, _segment_ids(segments))

    def on_one_device(heads: list[jax.Array], segments: jax.Array, which: jax.Array) -> jax.Array:
        if len(windows) == 1:
            return attend(local, heads, segments)
        return jax.lax.cond(
            which, lambda: attend(local, heads, segments), lambda: attend(None, heads, segments)
        )

    if jax.sharding.get_abstract_mesh().empty:
        mixed = on_one_device(heads, segments, which)
    else:
        split = PartitionSpec(row_axes, head_axes)
        mixed = jax.shard_map(
            on_one_device,
            in_specs=([split] * 3, PartitionSpec(row_axes), PartitionSpec()),
            out_specs=split,
            check_vma=False,
        )(heads, segments, which)
    return jnp.swapaxes(mixed, 1, 2).astype(query.dtype)


def _splash():
    # Imported where it is used: it loads Pallas for TPU, which nothing else needs.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    return splash


def _segment_ids(segments: jax.Array):
    return _splash().SegmentIds(q=segments, kv=segments)


def _splash_kernel(heads: int, length: int, window: int | None, softcap: float | None, interpret: bool):
    splash = _splash()
    shape = (length, length)
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name="attention_output",
        interpret=interpret,
    )
