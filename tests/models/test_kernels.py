"""Oracle: ``attention.causal_attention``, itself tested against loops; the TPU kernel runs interpreted."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models import decoder, kernels
from rlhf_jax.models.attention import causal_attention, causal_mask
from rlhf_jax.models.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=13,
    width=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_width=12,
    max_length=32,
)


def value_and_gradients(attend, arrays, cotangent):
    def total(*arrays):
        out = attend(*arrays)
        return jnp.sum(jnp.where(cotangent != 0, out * cotangent, 0)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return (jnp.where(cotangent != 0, out, 0), *gradients)


def inputs(length, head_dim):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(2, length, h, head_dim)), jnp.float32) for h in (4, 2, 2)]
    token_mask = np.arange(length)[None] >= np.array([[0], [5]])
    segments = np.where(np.arange(length) < length // 3, 0, 1)[None].repeat(2, 0)
    cotangent = np.where(token_mask[..., None, None], rng.normal(size=(2, length, 4, head_dim)), 0)
    return arrays, jnp.asarray(token_mask), jnp.asarray(segments), jnp.asarray(cotangent, jnp.float32)


def test_xla_attention_is_ours_in_value_and_gradient():
    arrays, token_mask, segments, cotangent = inputs(24, 4)
    mask = causal_mask(token_mask, segments, window=6)
    ours = value_and_gradients(lambda *x: causal_attention(*x, mask, scale=0.7), arrays, cotangent)
    theirs = value_and_gradients(
        lambda *x: kernels.dot_product_attention(*x, mask, scale=0.7, implementation="xla"), arrays, cotangent
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)


@pytest.mark.parametrize(("which", "split"), [(True, False), (False, False), (True, True)])
def test_splash_attention_is_ours_in_value_and_gradient(which, split):
    arrays, token_mask, segments, cotangent = inputs(256, 128)
    window = 70 if which else None
    mask = causal_mask(token_mask, segments, window=window)
    ours = value_and_gradients(
        lambda *x: causal_attention(*x, mask, scale=0.11, softcap=2.5), arrays, cotangent
    )

    def splash(*heads):
        return kernels.splash_attention(
            *heads,
            jnp.where(token_mask, segments, -1),
            scale=0.11,
            softcap=2.5,
            windows=(70, None),
            which=jnp.asarray(which),
            row_axes="data" if split else None,
            head_axes="tensor" if split else None,
            interpret=True,
        )

    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh) if split else contextlib.nullcontext():
        theirs = value_and_gradients(splash, arrays, cotangent)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_splash_says_which_lengths_it_takes():
    arrays, token_mask, segments, _ = inputs(24, 4)
    with pytest.raises(InputError, match="24 columns.*multiple of 128"):
        kernels.splash_attention(
            *arrays, segments, scale=1.0, softcap=None, windows=(None,), which=jnp.asarray(False)
        )


def test_the_decoder_uses_what_its_config_names():
    config = dataclasses.replace(CONFIG, window=5, window_pattern=(True, False))
    params = decoder.init_params(config, jax.random.key(0))
    tokens = np.random.default_rng(1).integers(0, 13, size=(2, 20))
    mask = np.arange(20)[None] >= np.array([[0], [6]])

    both = [
        jax.jit(decoder.logits, static_argnums=0)(
            dataclasses.replace(config, attention=attention), params, tokens, mask
        )
        for attention in ("own", "xla")
    ]
    np.testing.assert_allclose(*(np.asarray(logits)[mask] for logits in both), atol=1e-5)
    for attention, ours in (("own", True), ("xla", False)):  # ours alone has a backward pass of its own
        chosen = dataclasses.replace(config, attention=attention)
        traced = str(jax.make_jaxpr(lambda p, c=chosen: decoder.logits(c, p, tokens, mask))(params))
        assert ("custom_vjp_call" in traced) is ours
    splash = dataclasses.replace(config, attention="splash")
    jax.tree.map(np.testing.assert_array_equal, decoder.init_params(splash, jax.random.key(0)), params)
    with pytest.raises(InputError, match="20 columns"):
        decoder.logits(splash, params, tokens, mask)
