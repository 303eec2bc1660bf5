"""What lies where on a mesh of eight: parameters, moments, batches, caches; and what the compiled step communicates."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlhf_jax.models import decoder, heads
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel import hlo, sharding
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.stages import sft
from rlhf_jax.training.optimizer import OptimizerConfig, make_optimizer
from rlhf_jax.training.step import init_train_state, make_train_step
from rlhf_jax.types import DemonstrationBatch

# Tensors that no two parameters share a size with, so that a collective's shape says what it moves.
MODEL = ModelConfig(
    vocab_size=96,
    width=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=40,
    max_length=32,
    tied_embeddings=False,
)
MIXED = "data:2,fsdp:2,tensor:2"
BOTH = "data:4,tensor:2"


def params_on(mesh, config=MODEL):
    params = decoder.init_params(config, jax.random.key(0)) | {
        "head": heads.init_scalar_head(config, jax.random.key(1))
    }
    return jax.device_put(params, sharding.parameter_sharding(mesh, config, params))


def shard(x):
    return x.addressable_shards[0].data.shape


def test_each_parameter_is_split_as_the_table_says():
    params = params_on(meshes.make_mesh(MIXED))
    layers = params["decoder"]["layers"]
    assert shard(params["decoder"]["embedding"]) == (48, 8)
    assert shard(layers["query"]) == (3, 8, 16) and shard(layers["key"]) == (3, 8, 8)
    assert shard(layers["output"]) == (3, 16, 8)
    assert shard(layers["gate"]) == (3, 8, 20) and shard(layers["down"]) == (3, 20, 8)
    assert shard(layers["mlp_norm"]) == (3, 8)
    assert shard(params["head"]["kernel"]) == (8,) and shard(params["head"]["bias"]) == ()


def test_moments_lie_as_their_parameters_and_the_rest_is_whole():
    mesh = meshes.make_mesh("fsdp:8")
    params = params_on(mesh)
    optimizer = make_optimizer(OptimizerConfig(), 3)
    state = {"train": init_train_state(params, optimizer, jax.random.key(2)), "beta": jnp.zeros(())}
    places = sharding.mirrored(mesh, state, params, jax.tree.map(lambda x: x.sharding, params))
    moments = places["train"].opt_state[1][0]
    assert moments.mu["decoder"]["layers"]["up"].spec == P(None, ("fsdp",), None)
    for tree in (places["train"].params, moments.mu, moments.nu):
        assert jax.tree.map(lambda a, b: a == b.sharding, tree, params) == jax.tree.map(
            lambda _: True, params
        )
    assert moments.count.spec == places["beta"].spec == places["train"].key.spec == P()


def test_what_does_not_divide_stays_whole_and_is_named():
    mesh = meshes.make_mesh("fsdp:2,tensor:4")
    config = dataclasses.replace(MODEL, vocab_size=94)
    shapes = jax.eval_shape(lambda: decoder.init_params(config, jax.random.key(0)))
    found = sharding.whole_axes(mesh, config, shapes)
    assert [(whole.axis, whole.size, whole.parts) for whole in found] == [
        ("vocab", 94, 4),
        ("kv_heads", 2, 4),
    ]
    assert str(found[1]) == (
        "decoder/layers/key, decoder/layers/value: kv_heads has 2, which does not divide by 4; whole on every device"
    )
    places = sharding.parameter_sharding(mesh, config, shapes)["decoder"]
    assert places["embedding"].spec == P(None, ("fsdp",))
    # Two heads of 8 columns would divide by four columns-wise; a head is never cut.
    assert places["layers"]["key"].spec == P(None, ("fsdp",), None)
    assert places["layers"]["query"].spec == P(None, ("fsdp",), ("tensor",))
    assert sharding.whole_axes(meshes.make_mesh("fsdp:8"), MODEL, shapes) == []


def test_members_of_an_ensemble_are_whole_in_front_of_what_the_table_splits():
    mesh = meshes.make_mesh(MIXED)
    shapes = jax.eval_shape(
        jax.vmap(lambda key: decoder.init_params(MODEL, key)), jax.random.split(jax.random.key(0), 3)
    )
    places = sharding.parameter_sharding(mesh, MODEL, shapes)
    assert places["decoder"]["embedding"].spec == P(None, ("tensor",), ("fsdp",))


@pytest.fixture(scope="module")
def programs():
    """The compiled SFT step of 16 rows on each mesh, and the bytes of all parameters."""
    optimizer, objective = make_optimizer(OptimizerConfig(), 3), sft.make_objective(MODEL)
    batch = DemonstrationBatch(
        tokens=jnp.ones((16, 24), jnp.int32),
        token_mask=jnp.ones((16, 24), bool),
        response_mask=jnp.ones((16, 12), bool),
    )

    def compiled(mesh):
        params = {"decoder": params_on(mesh)["decoder"]}
        state = init_train_state(params, optimizer, jax.random.key(2))
        places = sharding.mirrored(mesh, state, params, jax.tree.map(lambda x: x.sharding, params))
        step = meshes.jit_step(
            lambda axis: make_train_step(objective, optimizer, axis_name=axis), mesh, places
        )
        with sharding.scope(mesh):
            return step.lower(jax.device_put(state, places), {}, meshes.put_rows(mesh, batch)).compile()

    return {name: compiled(meshes.make_mesh(name)) for name in ("data:8", "fsdp:8", BOTH, MIXED)}


def parameter_bytes():
    return 4 * sum(math.prod(s) for s in jax.tree.leaves(decoder.parameter_shapes(MODEL), is_leaf=_is_shape))


def _is_shape(x):
    return isinstance(x, tuple) and all(isinstance(size, int) for size in x)


def test_data_parallelism_sums_gradients_and_gathers_no_parameter(programs):
    found = hlo.count(programs["data:8"].as_text()).collectives
    assert {collective.kind for collective in found} == {"all-reduce"}
    summed = sum(collective.bytes * collective.times for collective in found)
    # Every gradient once, and a few scalars: weights, loss, metrics.
    assert parameter_bytes() <= summed < 1.02 * parameter_bytes()
    assert {collective.devices for collective in found} == {8}


def test_fsdp_gathers_what_it_uses_and_holds_an_eighth(programs):
    found = hlo.count(programs["fsdp:8"].as_text()).collectives
    gathered = sum(c.bytes * c.times for c in found if c.kind == "all-gather")
    # Forward and backward each; norms and what XLA chooses to split otherwise are the slack.
    assert gathered > parameter_bytes()
    assert any(c.kind in ("reduce-scatter", "all-reduce", "all-to-all") for c in found)
    held = {name: program.memory_analysis().argument_size_in_bytes for name, program in programs.items()}
    assert held["fsdp:8"] < held["data:8"] / 7


def part_bytes():
    """Of all parameters, those that one of two devices of the tensor axis has."""
    params = params_on(meshes.make_mesh(BOTH))["decoder"]
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))


def test_the_tensor_axis_sums_activations_and_gathers_no_parameter(programs):
    found = hlo.count(programs[BOTH].as_text()).collectives
    assert {collective.kind for collective in found} == {"all-reduce"}
    over_data = sum(c.bytes * c.times for c in found if c.devices == 4)
    assert part_bytes() <= over_data < 1.02 * part_bytes(), "the gradients of what a device has, once"
    states = 4 * 24 * 16 * 4  # bytes of the hidden states [B / 4, S, D] of one layer
    in_layer = sum(c.bytes for c in found if c.devices == 2 and c.times == MODEL.num_layers)
    # Forward, what comes out of attention and out of the MLP; backward, what goes into them: of query, key, value, gate
    # and up each, which XLA sums before it adds them and Megatron afterwards (2).
    assert 4 * states <= in_layer <= 7 * states
    # The lookup, and of the head hidden states of R = S / 2 columns and a few numbers a token.
    around = sum(c.bytes for c in found if c.devices == 2 and c.times == 1)
    assert 1.5 * states <= around < 2 * states
    assert in_layer * MODEL.num_layers + around == sum(c.bytes * c.times for c in found if c.devices == 2)


def test_three_axes_gather_over_fsdp_alone(programs):
    """Each device gathers its tensor part of a parameter, forward and backward, and nobody the whole of one."""
    found = hlo.count(programs[MIXED].as_text()).collectives
    gathers = [collective for collective in found if collective.kind == "all-gather"]
    assert {collective.devices for collective in gathers} == {2}
    gathered = sum(collective.bytes * collective.times for collective in gathers)
    assert 1.98 * part_bytes() < gathered < 2.02 * part_bytes()
    assert not any(MODEL.vocab_size in collective.shape for collective in gathers)
    assert {collective.kind for collective in found} - {"all-gather"} <= {"all-reduce", "reduce-scatter"}
    held = {name: programs[name].memory_analysis().argument_size_in_bytes for name in (MIXED, "data:8")}
    assert held[MIXED] < held["data:8"] / 3.5


def test_generation_on_a_mesh_gives_the_same_tokens_from_a_split_cache():
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 96, (8, 8)).astype(np.int32)
    mask = np.arange(8)[None] >= rng.integers(0, 6, (8, 1))
    sampling = SamplingConfig(max_new_tokens=13, temperature=0.8)

    def run(params, tokens, mask, key):
        return generate(MODEL, params, tokens, mask, key, sampling=sampling, eos_id=5, pad_id=0)

    found = {}
    for name in ("one", MIXED):
        mesh = meshes.data_mesh(1) if name == "one" else meshes.make_mesh(name)
        arguments = (params_on(mesh), *meshes.put_rows(mesh, (tokens, mask)), jax.random.key(4))
        with sharding.scope(mesh):
            program = jax.jit(run).lower(*arguments).compile()
        found[name] = program(*arguments)
        if name == MIXED:
            # [rows / 4, key/value heads / 2, columns, head width] a device, and nothing wider.
            assert "f32[2,1,21,8]" in program.as_text()
            assert "f32[8,2,21,8]" not in program.as_text()
    one, mixed = jax.device_get(found["one"]), jax.device_get(found[MIXED])
    np.testing.assert_array_equal(one.tokens, mixed.tokens)
    np.testing.assert_array_equal(one.response_mask, mixed.response_mask)
    np.testing.assert_allclose(one.log_probs, mixed.log_probs, atol=1e-5)
    assert len(set(one.response_mask.sum(axis=1).tolist())) > 1, "rows of several lengths"
