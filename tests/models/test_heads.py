import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import heads
from rlhf_jax.models.config import ModelConfig


def test_scalar_head_and_the_value_at_the_last_token():
    config = ModelConfig(
        vocab_size=5,
        width=4095,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        mlp_width=1,
        max_length=4,
    )
    head = heads.init_scalar_head(config, jax.random.key(1))
    np.testing.assert_allclose(np.std(head["kernel"]), 1 / 64, rtol=0.05)
    hidden = np.random.default_rng(0).normal(size=(3, 4, 4095))
    values = heads.scalar_head({"kernel": head["kernel"], "bias": jnp.float32(0.5)}, jnp.asarray(hidden))
    expected = hidden @ np.asarray(head["kernel"], np.float64) + 0.5
    np.testing.assert_allclose(values, expected, atol=1e-5)
    mask = jnp.array([[True, True, False, False], [False, True, True, True], [False] * 4])
    np.testing.assert_allclose(
        heads.last_token_values(values, mask), [expected[0, 1], expected[1, 3], 0.0], atol=1e-5
    )
    zero = heads.zero_scalar_head(config)
    np.testing.assert_array_equal(heads.scalar_head(zero, jnp.asarray(hidden)), 0.0)
    assert jax.tree.structure(heads.scalar_head_axes()) == jax.tree.structure(head)
