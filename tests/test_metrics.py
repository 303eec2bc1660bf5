"""Metrics merge exactly, are summed in float64, and their file is that of an undisturbed run after any kill."""

import json
import math
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from rlhf_jax.masking import WeightedSum
from rlhf_jax.metrics import (
    Accumulator,
    Maximum,
    MetricsWriter,
    mean_of,
    merge,
    merge_over_axis,
    read_metrics,
)


def part(total, weight, largest):
    return {
        "mean": WeightedSum(jnp.float32(total), jnp.float32(weight)),
        "largest": Maximum(jnp.float32(largest)),
    }


def test_merged_means_are_those_of_all_rows_together_never_averages_of_averages():
    rng = np.random.default_rng(0)
    pieces = [rng.normal(size, size=size).astype(np.float32) for size in (1, 7, 2, 30)]
    whole = Accumulator()
    for values in pieces:
        whole.add({"mean": mean_of(values), "largest": Maximum(values.max())})
    rows = np.concatenate(pieces).astype(np.float64)
    assert whole.values()["mean"] == pytest.approx(rows.sum() / 40, rel=1e-6)
    assert whole.values()["largest"] == rows.max()
    assert abs(whole.values()["mean"] - np.mean([p.mean() for p in pieces])) > 10


def test_sums_are_float64():
    # 2**24 + 1 is no float32: added up in float32, the ones would all be lost.
    total = Accumulator()
    total.add(part(2**24, 1, 0))
    for _ in range(9):
        total.add(part(1, 1, 0))
    assert total.values()["mean"] == (2**24 + 9) / 10


@pytest.mark.parametrize("compiled", [False, True])
def test_merge_goes_name_by_name(compiled):
    first = part(3, 4, -2) | {"only first": mean_of(jnp.float32(5))}
    second = part(10, 1, -7) | {"only second": Maximum(jnp.float32(6))}
    total = Accumulator()
    total.add((jax.jit(merge) if compiled else merge)(first, second))
    assert total.values() == {"mean": 13 / 5, "largest": -2, "only first": 5, "only second": 6}


def test_merging_over_devices_is_merging_over_parts():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(8, 3)).astype(np.float32)
    mask = rng.random((8, 3)) < 0.5

    def on_a_device(values, mask):
        metrics = {
            "mean": WeightedSum(jnp.where(mask, values, 0).sum(), mask.sum().astype(jnp.float32)),
            "largest": Maximum(values.max()),
        }
        return merge_over_axis(metrics, "data")

    found = jax.device_get(jax.pmap(on_a_device, axis_name="data")(values, mask))
    kept = [float(values[i, j]) for i in range(8) for j in range(3) if mask[i, j]]
    np.testing.assert_allclose(found["mean"].total, np.full(8, math.fsum(kept)), rtol=1e-6)
    np.testing.assert_array_equal(found["mean"].weight, np.full(8, len(kept)))
    np.testing.assert_array_equal(found["largest"].value, np.full(8, values.max()))


def test_what_is_not_finite_stays_visible_and_a_mean_over_nothing_is_zero():
    total = Accumulator()
    for value in (1.0, math.nan, 2.0):
        total.add(part(value, 1, value) | {"nothing": WeightedSum(jnp.float32(0), jnp.float32(0))})
    assert math.isnan(total.values()["mean"]) and math.isnan(total.values()["largest"])
    assert total.values()["nothing"] == 0.0


def test_an_accumulator_saved_halfway_goes_on_to_the_same_bits():
    parts = [part(0.1 * i, 3, math.sin(i)) for i in range(10)]
    whole = Accumulator()
    for i, metrics in enumerate(parts):
        if i == 6:
            halfway = Accumulator.from_json(json.loads(json.dumps(whole.to_json())))
        if i >= 6:
            halfway.add(metrics)
        whole.add(metrics)
    assert halfway.values() == whole.values()


def write(directory, start_step, steps):
    writer = MetricsWriter(directory, start_step=start_step)
    for step in steps:
        writer.write(step, {"loss": 1.0 / (step + 1)})
    writer.close()


@pytest.mark.parametrize("torn", ["", '{"step": 6, "lo', '{"step": 6, "loss": 0.5}'])
def test_a_file_is_cut_back_to_the_step_it_resumes_from(torn, tmp_path):
    write(tmp_path / "whole", -1, range(8))
    write(tmp_path / "killed", -1, range(6))
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write(torn)
    write(tmp_path / "killed", 3, range(4, 8))
    whole, killed = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed"))
    assert killed == whole
    assert [json.loads(line)["step"] for line in whole.splitlines()] == list(range(8))


def test_a_run_killed_before_its_first_checkpoint_begins_its_file_anew(tmp_path):
    write(tmp_path, -1, range(3))
    write(tmp_path, -1, [0])
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == [{"step": 0, "loss": 1.0}]


def test_reading_ends_at_a_torn_line_and_finds_nothing_where_nothing_is(tmp_path):
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "x": NaN}\n{"step": 2, "x": -Infinity}\n{"step": 3}')
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(first["x"]) and second == {"step": 2, "x": -math.inf}


def test_tensorboard_gets_the_same_numbers(tmp_path):
    write(tmp_path, -1, range(3))
    found = {}
    for file in (tmp_path / "tensorboard").iterdir():
        content = file.read_bytes()
        while content:  # records: length (8 bytes), its checksum (4), an event, its checksum (4)
            (length,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            content = content[16 + length :]
    assert found == {("loss", step): pytest.approx(1 / (step + 1)) for step in range(3)}
