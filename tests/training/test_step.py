"""The train step: the same update however the batch is split, over micro-batches or devices, by jit or pmap."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import masking
from rlhf_jax.masking import WeightedSum
from rlhf_jax.metrics import Maximum
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.training.step import init_train_state, make_train_step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    x: jax.Array
    y: jax.Array
    mask: jax.Array


def objective(params, frozen, batch):
    """Two terms with different denominators: tokens, and rows."""
    error = (jnp.einsum("btd,d->bt", batch.x, params["w"]) - batch.y * frozen["scale"]) ** 2
    rows = masking.masked_sum(error, batch.mask, axis=1)
    terms = {
        "token": masking.token_mean(error, batch.mask),
        "row": WeightedSum(0.1 * rows.sum(), jnp.float32(rows.shape[0])),
    }
    return terms, {"largest": Maximum(jnp.max(jnp.where(batch.mask, error, 0.0)))}


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 7, size=16)
    lengths[3] = 0  # a row without a single token
    batch = Rows(
        x=rng.normal(size=(16, 6, 5)).astype(np.float32),
        y=rng.normal(size=(16, 6)).astype(np.float32),
        mask=np.arange(6)[None] < lengths[:, None],
    )
    params = {"w": rng.normal(size=5).astype(np.float32)}
    return batch, params, {"scale": jnp.float32(2.0)}


def oracle_gradient(batch, params, scale):
    """The gradient of (sum of token errors / tokens) + 0.1 (sum of row sums / rows), by loops in float64."""
    gradient, tokens = np.zeros(5), batch.mask.sum()
    for i in range(16):
        for t in range(6):
            if batch.mask[i, t]:
                x = batch.x[i, t].astype(np.float64)
                residual = x @ params["w"].astype(np.float64) - batch.y[i, t] * scale
                gradient += 2 * residual * x * (1 / tokens + 0.1 / 16)
    return gradient


def test_update_follows_the_exact_gradient_for_any_split(problem):
    batch, params, frozen = problem
    optimizer = optax.sgd(0.1)
    expected = params["w"] - 0.1 * oracle_gradient(batch, params, 2.0)
    for parts in (1, 2, 4, 8):
        step = jax.jit(make_train_step(objective, optimizer, num_microbatches=parts))
        state, metrics = step(init_train_state(params, optimizer, jax.random.key(0)), frozen, batch)
        # Parameters of the unit 1, from which as much is taken: what is left is exact beside that.
        np.testing.assert_allclose(state.params["w"], expected, rtol=2e-6, atol=1e-7)
        np.testing.assert_allclose(
            metrics["loss/token"].total / metrics["loss/token"].weight
            + metrics["loss/row"].total / metrics["loss/row"].weight,
            metrics["loss"].total,
            rtol=1e-6,
        )


@pytest.mark.parametrize("parallelism", ["jit", "pmap"])
@pytest.mark.parametrize("parts", [1, 2])
def test_update_is_the_same_on_eight_devices(problem, parallelism, parts):
    batch, params, frozen = problem
    optimizer = optax.sgd(0.1)
    one = jax.jit(make_train_step(objective, optimizer))
    expected, expected_metrics = one(init_train_state(params, optimizer, jax.random.key(0)), frozen, batch)
    mesh = meshes.data_mesh()
    assert mesh.devices.size == 8
    step = meshes.compile_step(
        lambda axis: make_train_step(objective, optimizer, num_microbatches=parts, axis_name=axis),
        mesh,
        parallelism,
    )
    state = jax.device_put(init_train_state(params, optimizer, jax.random.key(0)), meshes.replicated(mesh))
    state, metrics = step(state, frozen, batch)
    np.testing.assert_allclose(state.params["w"], expected.params["w"], rtol=2e-6)
    np.testing.assert_allclose(metrics["loss"].total, expected_metrics["loss"].total, rtol=2e-6)
    np.testing.assert_allclose(metrics["largest"].value, expected_metrics["largest"].value, rtol=1e-6)
    assert int(state.step) == 1


def test_an_update_that_is_not_finite_is_left_out_and_counted(problem):
    batch, params, frozen = problem
    optimizer = optax.adam(0.1)
    step = jax.jit(make_train_step(objective, optimizer))
    state = init_train_state(params, optimizer, jax.random.key(0))
    poisoned = dataclasses.replace(batch, y=np.where(batch.mask, np.inf, batch.y).astype(np.float32))
    skipped, metrics = step(state, frozen, poisoned)
    assert metrics["skipped_updates"].total == 1 and int(skipped.skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, skipped.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, skipped.opt_state, state.opt_state)
    after, metrics = step(skipped, frozen, batch)
    assert metrics["skipped_updates"].total == 0 and int(after.skipped) == 0
    assert np.abs(after.params["w"] - params["w"]).max() > 0.01


def test_a_batch_without_any_token_changes_nothing(problem):
    batch, params, frozen = problem
    empty = dataclasses.replace(batch, mask=np.zeros_like(batch.mask))
    step = jax.jit(make_train_step(objective, optax.sgd(0.1), num_microbatches=2))
    state, metrics = step(init_train_state(params, optax.sgd(0.1), jax.random.key(0)), frozen, empty)
    np.testing.assert_array_equal(state.params["w"], params["w"])
    assert metrics["loss"].total == 0


def test_rows_that_do_not_divide_are_refused(problem):
    batch, params, frozen = problem
    step = make_train_step(objective, optax.sgd(0.1), num_microbatches=3)
    with pytest.raises(ValueError, match="16 rows does not divide into num_microbatches=3"):
        step(init_train_state(params, optax.sgd(0.1), jax.random.key(0)), frozen, batch)
