"""Oracle: the same tokens through ``decoder.hidden_states`` at once, for every part that decoding has of its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import cache, decoder
from rlhf_jax.models.config import ModelConfig

PLAIN = ModelConfig(
    vocab_size=29,
    width=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_width=20,
    max_length=32,
)
MODELS = {
    "windows everywhere, biases": {"window": 4, "qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "as Gemma": {
        "window": 3,
        "window_pattern": (True, False),
        "rope_theta": 300.0,
        "local_rope_theta": 20.0,
        "rope_scaling": "linear",
        "rope_factor": 2.0,
        "query_key_norms": True,
        "post_norms": True,
        "zero_centred_norms": True,
        "scaled_embeddings": True,
        "query_pre_attn_scalar": 11.0,
        "attention_softcap": 2.0,
        "activation": "gelu_tanh",
    },
    "as GPT-2": {
        "norm": "layer",
        "positions": "learned",
        "gated_mlp": False,
        "activation": "gelu",
        "qkv_bias": True,
    },
    "as Pythia": {
        "norm": "layer",
        "parallel_residual": True,
        "rotary_fraction": 0.34,
        "gated_mlp": False,
        "mlp_bias": True,
    },
}
PROMPT, TOTAL = 7, 14


@pytest.mark.parametrize("name", MODELS)
def test_decoding_gives_what_reading_at_once_gives(name):
    config = dataclasses.replace(PLAIN, **MODELS[name])
    leaves, tree = jax.tree.flatten(decoder.init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.unflatten(
        tree, [jnp.asarray(x + 0.3 * rng.normal(size=x.shape), jnp.float32) for x in leaves]
    )
    tokens = rng.integers(0, 29, size=(2, TOTAL)).astype(np.int32)
    mask = np.arange(TOTAL)[None] >= np.array([[0], [4]])
    expected = np.asarray(jax.jit(decoder.hidden_states, static_argnums=0)(config, params, tokens, mask))

    weights = cache.decoding_weights(config, params)
    read = jax.jit(cache.prefill, static_argnums=(0, 4))
    hidden, kept = read(config, weights, tokens[:, :PROMPT], mask[:, :PROMPT], TOTAL)
    np.testing.assert_allclose(hidden, expected[:, PROMPT - 1], atol=2e-5)
    step = jax.jit(cache.decode_step, static_argnums=0)
    for column in range(PROMPT, TOTAL):
        readable = mask & (np.arange(TOTAL) <= column)
        positions = mask[:, :column].sum(axis=1).astype(np.int32)
        hidden, kept = step(config, weights, kept, tokens[:, column], positions, jnp.int32(column), readable)
        np.testing.assert_allclose(hidden, expected[:, column], atol=2e-5, err_msg=f"column {column}")
