import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models import decoder
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.parts import positions_from_mask

CONFIG = ModelConfig(
    vocab_size=23,
    width=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_width=20,
    max_length=32,
    tied_embeddings=False,
)


@pytest.fixture(scope="module")
def params():
    # Larger than fresh ones, so that attention is far from uniform and the norms are far from their epsilon.
    fresh = decoder.init_params(CONFIG, jax.random.key(0))["decoder"]
    layers = jax.tree.map(lambda x: x * 2.0 if x.ndim > 2 else x, fresh["layers"])
    return {"decoder": {**fresh, "layers": layers, "embedding": 50.0 * fresh["embedding"]}}


@pytest.fixture(scope="module")
def logits():
    return jax.jit(decoder.logits, static_argnums=0)


TOKENS = np.random.default_rng(0).integers(0, 23, size=(2, 12))
REAL = np.ones((2, 12), bool)


def test_positions_count_real_tokens_and_start_again_with_a_segment():
    mask = jnp.array([[False, False, True, True, True, True, False]])
    np.testing.assert_array_equal(positions_from_mask(mask)[:, 2:6], [[0, 1, 2, 3]])
    segments = jnp.array([[0, 0, 5, 5, 7, 7, 0]])
    np.testing.assert_array_equal(positions_from_mask(mask, segments)[:, 2:6], [[0, 1, 0, 1]])


def test_logits_do_not_depend_on_later_tokens(params):
    def at_column_five(embedding_shift):
        table = params["decoder"]["embedding"]
        states = jnp.take(table, TOKENS[0], axis=0) + embedding_shift
        # One vocabulary row a column turns a gradient by embedding row into a gradient by column.
        own = {**params["decoder"], "embedding": states}
        config = dataclasses.replace(CONFIG, vocab_size=12, tied_embeddings=True)
        out = decoder.hidden_states(config, {"decoder": own}, jnp.arange(12)[None], jnp.asarray(REAL[:1]))
        return jnp.sum(out[0, 5] * jnp.arange(16.0))

    gradient = np.asarray(jax.jit(jax.grad(at_column_five))(jnp.zeros((12, 16))))
    np.testing.assert_array_equal(gradient[6:], 0.0)
    assert (np.abs(gradient[:6]).max(axis=1) > 1e-3).all()


def test_padding_moves_nothing_whatever_its_id(params, logits):
    plain = np.asarray(logits(CONFIG, params, TOKENS[:, 4:], REAL[:, 4:]))
    mask = REAL.copy()
    mask[:, :4] = False
    left = np.asarray(logits(CONFIG, params, TOKENS, mask))
    np.testing.assert_allclose(left[:, 4:], plain, atol=1e-5)
    for strange in (-1, 23, 2**31 - 1):
        tokens = np.where(mask, TOKENS, strange).astype(np.int32)
        np.testing.assert_array_equal(logits(CONFIG, params, tokens, mask), left)
    right = np.asarray(logits(CONFIG, params, np.roll(TOKENS, -4, axis=1), np.roll(mask, -4, axis=1)))
    np.testing.assert_allclose(right[:, :8], plain, atol=1e-5)


def test_rows_do_not_influence_each_other(params, logits):
    both = np.asarray(logits(CONFIG, params, TOKENS, REAL))
    other = TOKENS.copy()
    other[1] = (other[1] + 7) % 23
    np.testing.assert_array_equal(np.asarray(logits(CONFIG, params, other, REAL))[0], both[0])


def test_packed_segments_equal_separate_rows(params, logits):
    packed = TOKENS.reshape(1, 24)
    segments = np.repeat([[3, 9]], 12, axis=1)
    hidden = decoder.hidden_states(CONFIG, params, packed, np.ones((1, 24), bool), segment_ids=segments)
    together = decoder.vocabulary_logits(hidden, decoder.unembedding(CONFIG, params))
    separate = logits(CONFIG, params, TOKENS, REAL)
    np.testing.assert_allclose(np.asarray(together).reshape(2, 12, 23), separate, atol=1e-5)


def test_remat_changes_no_gradient(params):
    def loss(config):
        def value(params):
            hidden = decoder.hidden_states(config, params, jnp.asarray(TOKENS), jnp.asarray(REAL))
            return jnp.mean(jnp.sin(3.0 * hidden))

        return jax.jit(jax.grad(value))(params)

    kept, again = loss(CONFIG), loss(dataclasses.replace(CONFIG, remat="full"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), kept, again)
    assert np.abs(kept["decoder"]["layers"]["query"]).max() > 1e-5


def test_gradient_agrees_with_central_differences(params):
    mask = REAL.copy()
    mask[0, :3] = False

    def loss(params):
        hidden = decoder.hidden_states(CONFIG, params, jnp.asarray(TOKENS), jnp.asarray(mask))
        return jnp.sum(jnp.where(mask[..., None], jnp.sin(hidden), 0.0))

    loss = jax.jit(loss)
    gradient = jax.jit(jax.grad(loss))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient["decoder"]):
        name = path[-1].key
        if name == "unembedding":
            np.testing.assert_array_equal(leaf, 0.0)
            continue
        slope = float(jnp.sqrt(jnp.sum(leaf**2)))
        # Along its own gradient a function of float32 changes enough to be measured.
        direction = jax.tree_util.tree_map_with_path(
            lambda p, g, name=name, slope=slope: g / slope if p[-1].key == name else jnp.zeros_like(g),
            gradient,
        )
        ends = [
            float(loss(jax.tree.map(lambda p, d, sign=sign: p + sign * 3e-3 * d, params, direction)))
            for sign in (1, -1)
        ]
        np.testing.assert_allclose((ends[0] - ends[1]) / 6e-3, slope, rtol=2e-2, err_msg=name)


def test_bfloat16_computes_in_bfloat16_and_stays_close(params, logits):
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    hidden = decoder.hidden_states(config, params, TOKENS, REAL)
    assert hidden.dtype == jnp.bfloat16
    exact = np.asarray(logits(CONFIG, params, TOKENS, REAL))
    rough = logits(config, params, TOKENS, REAL)
    assert rough.dtype == jnp.float32
    difference = np.sqrt(np.mean((np.asarray(rough) - exact) ** 2)) / exact.std()
    assert 1e-4 < difference < 0.03


# Every parameter that a model can have.
EVERYTHING = dataclasses.replace(
    CONFIG,
    norm="layer",
    positions="learned",
    post_norms=True,
    query_key_norms=True,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
)


@pytest.mark.parametrize(("config", "count"), [(CONFIG, 12), (EVERYTHING, 29)])
def test_every_parameter_has_a_name_for_every_axis(config, count):
    axes = decoder.logical_axes(config)
    shapes = decoder.parameter_shapes(config)
    sizes = {
        "layers": {3},
        "vocab": {23},
        "position": {32},
        "embed": {16},
        "heads": {16},
        "kv_heads": {8},
        "head_dim": {4},
        "mlp": {20},
    }
    assert len(jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))) == count
    flat_axes = jax.tree_util.tree_leaves_with_path(
        axes, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec)
    )
    flat_shapes = dict(jax.tree_util.tree_leaves_with_path(shapes, is_leaf=lambda x: isinstance(x, tuple)))
    assert {path for path, _ in flat_axes} == set(flat_shapes)
    for path, names in flat_axes:
        assert len(names) == len(flat_shapes[path])
        for name, size in zip(names, flat_shapes[path], strict=True):
            assert size in sizes[name]


def test_a_key_goes_on_giving_the_weights_it_gave():
    """Recorded before there were other families: runs that are started again must not begin elsewhere."""
    fresh = decoder.init_params(CONFIG, jax.random.key(5))["decoder"]
    recorded = {
        "query": -0.4635592,
        "key": 0.2598209,
        "value": 0.148609,
        "output": -0.0835302,
        "gate": -0.0683592,
        "up": 0.1746594,
        "down": 0.0516366,
        "embedding": 0.00822181,
        "unembedding": 0.00934652,
    }
    found = {name: float(fresh["layers"][name][1, 2, 3]) for name in recorded if name in fresh["layers"]}
    found |= {name: float(fresh[name][2, 3]) for name in ("embedding", "unembedding")}
    assert found == pytest.approx(recorded, rel=1e-5)


def test_fresh_norms_are_the_identity_however_they_are_kept():
    plain, centred = (
        decoder.init_params(dataclasses.replace(CONFIG, zero_centred_norms=centred), jax.random.key(3))[
            "decoder"
        ]
        for centred in (False, True)
    )
    for name in ("attention_norm", "mlp_norm"):
        np.testing.assert_array_equal(plain["layers"][name], 1.0)
        np.testing.assert_array_equal(centred["layers"][name], 0.0)
    np.testing.assert_array_equal(plain["final_norm"], 1.0 + centred["final_norm"])


def test_rows_longer_than_the_learned_positions_are_refused_unless_packed():
    config = dataclasses.replace(CONFIG, positions="learned", max_length=12)
    params = decoder.init_params(config, jax.random.key(0))
    packed, segments = TOKENS.reshape(1, 24), np.repeat([[0, 1]], 12, axis=1)
    with pytest.raises(InputError, match="24 columns.*12 learned positions"):
        decoder.hidden_states(config, params, packed, np.ones((1, 24), bool))
    together = decoder.hidden_states(config, params, packed, np.ones((1, 24), bool), segment_ids=segments)
    separate = decoder.hidden_states(config, params, TOKENS, REAL)
    np.testing.assert_allclose(together.reshape(2, 12, 16), separate, atol=1e-5)


def test_logits_are_capped_where_the_config_says_so(params):
    config = dataclasses.replace(CONFIG, logit_softcap=0.5)
    bare = np.asarray(decoder.logits(CONFIG, params, TOKENS, REAL), np.float64)
    capped = decoder.logits(config, params, TOKENS, REAL)
    np.testing.assert_allclose(capped, 0.5 * np.tanh(bare / 0.5), atol=1e-5)


def test_fresh_parameters_follow_the_key_and_the_stated_scales():
    config = dataclasses.replace(CONFIG, width=64, mlp_width=96, num_heads=16)
    fresh = decoder.init_params(config, jax.random.key(3))
    again = decoder.init_params(config, jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, fresh, again)
    layers = fresh["decoder"]["layers"]
    assert not np.array_equal(layers["query"][0], layers["query"][1])
    np.testing.assert_allclose(np.std(layers["query"]), 64**-0.5, rtol=0.03)
    np.testing.assert_allclose(np.std(layers["down"]), (96 * 6) ** -0.5, rtol=0.03)
    np.testing.assert_array_equal(layers["mlp_norm"], 1.0)
    np.testing.assert_allclose(np.std(fresh["decoder"]["embedding"]), 0.02, rtol=0.1)
