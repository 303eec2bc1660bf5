"""Two ways to run one step on eight devices, against one worked in NumPy; and what cannot be laid out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.parallel import mesh as meshes


def make_step(axis):
    """One step of gradient descent on a masked mean of squares, plus noise from the state's typed key."""

    def step(state, frozen, batch):
        residual = jnp.where(batch["mask"], batch["x"] @ state["w"] - frozen["y"], 0.0)
        gradient, rows = 2 * residual @ batch["x"], batch["mask"].sum().astype(jnp.float32)
        if axis is not None:
            gradient, rows = jax.lax.psum((gradient, rows), axis)
        noise = jax.random.normal(jax.random.fold_in(state["key"], state["step"]), state["w"].shape)
        w = state["w"] - 0.1 * gradient / rows + 0.01 * noise
        return {"w": w, "key": state["key"], "step": state["step"] + 1}, {"rows": rows}

    return step


@pytest.mark.parametrize("parallelism", ["jit", "pmap"])
def test_steps_on_eight_devices_are_those_of_numpy(parallelism):
    rng = np.random.default_rng(0)
    batches = [
        {"x": rng.normal(size=(16, 3)).astype(np.float32), "mask": rng.random(16) < 0.7} for _ in range(2)
    ]
    mesh = meshes.data_mesh()
    w = rng.normal(size=3)
    state = {"w": jnp.asarray(w, jnp.float32), "key": jax.random.key(5), "step": jnp.int32(0)}
    state = jax.device_put(state, meshes.replicated(mesh))
    frozen = jax.device_put({"y": jnp.float32(0.5)}, meshes.replicated(mesh))
    step, key = meshes.compile_step(make_step, mesh, parallelism), jax.random.key(5)
    for number, batch in enumerate(batches):
        state, metrics = step(state, frozen, batch)
        gradient = np.zeros(3)
        for x, kept in zip(batch["x"].astype(np.float64), batch["mask"], strict=True):
            gradient += kept * 2 * (x @ w - 0.5) * x
        noise = np.asarray(jax.random.normal(jax.random.fold_in(key, number), (3,)), np.float64)
        w = w - 0.1 * gradient / batch["mask"].sum() + 0.01 * noise
        assert metrics["rows"] == batch["mask"].sum()
    np.testing.assert_allclose(state["w"], w, rtol=1e-5)
    assert int(state["step"]) == 2
    assert jax.random.key_data(state["key"]).tolist() == jax.random.key_data(key).tolist()


def test_rows_are_split_and_parameters_are_whole_on_every_device():
    mesh = meshes.data_mesh()
    rows = meshes.put_rows(mesh, {"x": np.arange(16).reshape(16, 1)})["x"]
    assert [shard.data.ravel().tolist() for shard in rows.addressable_shards] == [
        [2 * i, 2 * i + 1] for i in range(8)
    ]
    whole = jax.device_put(np.arange(16), meshes.replicated(mesh))
    assert [shard.data.tolist() for shard in whole.addressable_shards] == [list(range(16))] * 8
    assert meshes.data_mesh(2).devices.ravel().tolist() == jax.devices()[:2]


def test_what_cannot_be_laid_out_is_refused():
    mesh = meshes.data_mesh()
    meshes.check_rows(mesh, 16, "batch_size")
    with pytest.raises(
        InputError, match="batch_size is 12, which does not divide over 8 devices; use a multiple of 8"
    ):
        meshes.check_rows(mesh, 12, "batch_size")
    with pytest.raises(InputError, match="--parallelism='tpu'; use 'jit' or 'pmap'"):
        meshes.compile_step(make_step, mesh, "tpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dat:8", "there is no axis 'dat'; name data, fsdp or tensor"),
        ("data", "the size of data is ''; give a whole number above 0, as in data:4"),
        ("data:0,fsdp:8", "the size of data is '0'"),
        ("data:-1", "the size of data is '-1'"),
        ("fsdp:4,fsdp:2", "fsdp is there twice"),
        ("fsdp:4", "is for 4 devices and there are 8; give sizes whose product is 8"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(text, message):
    with pytest.raises(InputError, match=f"--mesh={text}.*{message}"):
        meshes.make_mesh(text)


def test_a_mesh_has_three_axes_and_rows_are_split_over_two():
    assert dict(meshes.make_mesh("").shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    mesh = meshes.make_mesh(" tensor:2, data:2 ,fsdp:2")
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    rows = meshes.put_rows(mesh, np.arange(8).reshape(8, 1))
    assert sorted(shard.data.ravel().tolist() for shard in rows.addressable_shards) == [
        [2 * i, 2 * i + 1] for i in range(4) for _ in range(2)
    ]
    meshes.check_rows(mesh, 12, "batch_size")
    with pytest.raises(InputError, match="batch_size is 6, which does not divide over 4 devices"):
        meshes.check_rows(mesh, 6, "batch_size")


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    process_index: int


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ([(0, 2), (2, 4), (4, 6), (6, 8)], True),  # rows over both processes
        ([(0, 4), (0, 4), (4, 8), (4, 8)], True),  # tensor within each
        ([(0, 8)] * 4, False),  # tensor over both
        ([(0, 2), (2, 4), (0, 4), (4, 8)], False),  # the first process alone would see nothing wrong
        ([(4, 6), (6, 8), (0, 2), (2, 4)], False),  # the second process's devices come first
        ([(0, 1), (3, 4), (4, 6), (6, 8)], False),  # rows 1 to 3 are nowhere
    ],
)
def test_whether_rows_are_exchanged_is_known_of_all_processes_at_once(held, expected):
    places = {Device(number, number // 2): slice(*rows) for number, rows in enumerate(held)}
    assert meshes.holds_what_it_reads(places, 4) is expected
