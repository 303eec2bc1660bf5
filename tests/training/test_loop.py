"""The loop around a step: what it writes and when, how it stops, and the guard against updates that come to nothing."""

import pathlib

import grain
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.checkpoints import Checkpoints
from rlhf_jax.errors import InputError
from rlhf_jax.metrics import MetricsWriter, mean_of, read_metrics
from rlhf_jax.training import loop
from rlhf_jax.training.interrupt import Interrupted, StopRequest
from rlhf_jax.training.loop import MAX_SKIPPED_UPDATES, Schedule, fit


def batches(values=12) -> grain.DatasetIterator:
    """1, 2, 3, ... one a batch."""
    dataset = grain.MapDataset.range(1, values + 1).repeat(5).batch(1)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def step(state, batch):
    """The sum of all batches, with a skip for every one of 100 or more."""
    bad = int(batch[0]) >= 100
    total = state["total"] + (0 if bad else int(batch[0]))
    skipped = state["skipped"] + 1 if bad else 0
    return {"total": total, "skipped": skipped}, {"seen": mean_of(batch)}


def run(workdir, schedule, *, stop=None, iterator=None, step=step, **more):
    return fit(
        state={"total": jnp.int32(0), "skipped": jnp.int32(0)},
        step=lambda state, batch: _as_arrays(*step(state, batch)),
        batches=iterator or batches(),
        schedule=schedule,
        workdir=workdir,
        progress=lambda done, values: None,
        stop=stop or StopRequest(),
        evaluate=lambda state: {"eval/total": float(state["total"])},
        skipped_updates=lambda state: state["skipped"],
        **more,
    )


def _as_arrays(state, metrics):
    return {name: jnp.int32(value) for name, value in state.items()}, metrics


def rows(workdir):
    return list(read_metrics(workdir / "metrics.jsonl"))


EXPECTED = [
    {"step": 0, "eval/total": 0.0},
    {"step": 3, "seen": 2.0},
    {"step": 4, "eval/total": 10.0},
    {"step": 6, "seen": 5.0},
    {"step": 7, "seen": 7.0, "eval/total": 28.0},
]
SCHEDULE = Schedule(num_steps=7, log_every=3, eval_every=4, save_every=5)


def test_rows_cover_their_steps_and_first_and_last_step_are_evaluated(tmp_path):
    state = run(tmp_path, SCHEDULE)
    assert int(state["total"]) == 1 + 2 + 3 + 4 + 5 + 6 + 7
    assert rows(tmp_path) == EXPECTED
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir())
    assert saved == ["5", "7"]


def steps_saved(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.is_dir())


def test_checkpoints_are_made_by_the_clock_too(tmp_path):
    """Steps of 40 seconds: 5 ends 200 seconds after the start, 7 is one of every 7, 12 ends 200 seconds after that."""
    seconds = [0.0]

    def slow_step(state, batch):
        seconds[0] += 40.0
        return step(state, batch)

    schedule = Schedule(num_steps=13, save_every=7, save_every_minutes=3.0, keep=10)
    run(tmp_path, schedule, step=slow_step, clock=lambda: seconds[0])
    assert steps_saved(tmp_path) == [5, 7, 12, 13]


def test_some_checkpoints_are_kept_for_good(tmp_path):
    run(tmp_path, Schedule(num_steps=11, save_every=1, keep=3, keep_every=4))
    assert steps_saved(tmp_path) == [4, 8, 9, 10, 11]


class StopOnceAsked(StopRequest):
    """Asks to stop at the ``asked``-th look."""

    def __init__(self, asked):
        self._left = asked

    @property
    def requested(self):
        self._left -= 1
        return "SIGINT" if self._left <= 0 else None


def test_stopped_after_any_step_and_started_again_it_writes_the_same(tmp_path):
    for done in range(3):
        with pytest.raises(
            Interrupted, match=rf"SIGINT: saved step {done} of 7 in .*checkpoints; run the same"
        ):
            run(tmp_path, SCHEDULE, stop=StopOnceAsked(1 if done == 0 else 2))
    assert int(run(tmp_path, SCHEDULE)["total"]) == 28
    assert rows(tmp_path) == EXPECTED


def test_a_finished_run_is_neither_trained_nor_written_again(tmp_path):
    run(tmp_path, SCHEDULE)

    def never(state, batch):
        raise AssertionError("trained again")

    assert int(run(tmp_path, SCHEDULE, step=never)["total"]) == 28
    assert rows(tmp_path) == EXPECTED


def test_an_error_in_a_step_keeps_what_was_saved(tmp_path):
    def breaks(state, batch):
        if batch[0] == 7:
            raise ZeroDivisionError
        return step(state, batch)

    with pytest.raises(ZeroDivisionError):
        run(tmp_path, SCHEDULE, step=breaks)
    assert rows(tmp_path) == EXPECTED[:4]
    assert int(run(tmp_path, SCHEDULE)["total"]) == 28
    assert rows(tmp_path) == EXPECTED


class FullDisk(MetricsWriter):
    """Of which the disk takes no row after the fifth step."""

    def write(self, step, values):
        if step > 5:
            self._file.close()
            self._file = pathlib.Path("/dev/full").open("a")  # noqa: SIM115, the writer closes it
        super().write(step, values)


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="this machine has no /dev/full")
def test_a_disk_too_full_for_metrics_ends_the_run_in_a_sentence_and_the_save_under_way_whole(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "MetricsWriter", FullDisk)
    with pytest.raises(
        InputError, match=r"cannot write .*metrics.jsonl: No space left on device; .* make room"
    ):
        run(tmp_path, SCHEDULE)
    assert steps_saved(tmp_path) == [5] and (tmp_path / "checkpoints" / "5.sha256.json").exists()
    monkeypatch.undo()
    assert int(run(tmp_path, SCHEDULE)["total"]) == 28
    assert rows(tmp_path) == EXPECTED


def test_metrics_that_cannot_be_opened_are_named(tmp_path):
    (tmp_path / "metrics.jsonl.partial").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*metrics.jsonl: Is a directory"):
        run(tmp_path, SCHEDULE)


@pytest.mark.parametrize(
    ("good", "kept"),
    [(0, "no checkpoint was saved yet"), (6, r"step 5 is saved in .*checkpoints")],
)
def test_updates_that_are_skipped_again_and_again_end_the_run_in_a_sentence(good, kept, tmp_path):
    assert MAX_SKIPPED_UPDATES == 10
    values = grain.MapDataset.source([*range(1, good + 1), *[100] * 30]).batch(1)
    iterator = iter(values.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
    schedule = Schedule(num_steps=30, save_every=5 if good else 30)
    rows = (
        ", whose batch held "
        + "".join(f"{good + 9}:{row}, " for row in range(7))
        + f"{good + 9}:7 and 4 more"
    )
    expected = (
        f"not finite in the last 10 updates, up to step {good + 10}{rows}; {kept}; lower --config.optimizer"
    )
    with pytest.raises(InputError, match=expected):
        run(tmp_path, schedule, iterator=iterator, sources_of=lambda n: [f"{n}:{row}" for row in range(12)])
    # What is kept is the newest state of which the last update was good.
    if good:
        saver, state = Checkpoints(tmp_path), {"total": jnp.int32(0), "skipped": jnp.int32(0)}
        step_saved, state, _ = saver.restore_newest(state, iterator)
        saver.close()
        assert (step_saved, int(state["total"]), int(state["skipped"])) == (5, 15, 0)


def test_skipped_updates_that_are_not_in_a_row_are_forgiven(tmp_path):
    values = grain.MapDataset.source(([100] * 9 + [1]) * 2).batch(1)
    iterator = iter(values.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
    assert int(run(tmp_path, Schedule(num_steps=20), iterator=iterator)["total"]) == 2
    assert np.mean([row["seen"] for row in rows(tmp_path)[1:]]) == pytest.approx((18 * 100 + 2) / 20)
