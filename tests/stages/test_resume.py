"""Interrupt a stage, run it again: the same bits as the run that nobody disturbed."""

import dataclasses
import functools
import gc
import json
import pathlib

import jax
import numpy as np
import pytest

from rlhf_jax import checkpoints
from rlhf_jax.errors import InputError
from rlhf_jax.stages import dpo, ppo, reward_model, sft
from rlhf_jax.training import loop
from rlhf_jax.training.interrupt import Interrupted, StopRequest
from rlhf_jax.training.loop import Schedule
from rlhf_jax.training.optimizer import OptimizerConfig

from .conftest import DPO, PPO, REWARD, SFT, StopAfter


def params_of(workdir):
    return checkpoints.restore_params(checkpoints.handoff_path(pathlib.Path(workdir)))


def runners(ladder):
    start = {"init_from": ladder.sft}
    return {
        "sft": functools.partial(sft.run, SFT),
        "reward_model": functools.partial(reward_model.run, REWARD, **start),
        "dpo": functools.partial(dpo.run, DPO, **start),
        "ppo": functools.partial(ppo.run, PPO, reward_from=ladder.reward_model, **start),
    }


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo", pytest.param("ppo", marks=pytest.mark.slow)])
def test_interrupted_twice_equals_undisturbed_bitwise(stage, ladder, tmp_path):
    run = runners(ladder)[stage]
    run(tmp_path / "whole", stop=StopRequest())
    # The first stop falls between two checkpoints and inside a row of metrics (log_every=2).
    for steps in (1, 1):
        with pytest.raises(
            Interrupted, match=r"saved step \d of 4 in .*checkpoints; run the same command again"
        ):
            run(tmp_path / "halves", stop=StopAfter(steps))
        assert not checkpoints.is_finished(tmp_path / "halves")
    run(tmp_path / "halves", stop=StopRequest())
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path / "halves"), params_of(tmp_path / "whole"))
    whole, halves = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "halves"))
    assert halves == whole
    assert [json.loads(line)["step"] for line in whole.splitlines()] == [0, 2, 4]


@pytest.mark.slow
def test_a_run_that_goes_on_holds_no_more_than_one_that_starts(ladder, tmp_path, monkeypatch):
    """Where its first state stayed beside what it reads, there would be two of the optimiser's moments."""
    held, real = [], loop._agree

    def agree(*args):
        gc.collect()
        held.append(sum(x.nbytes for x in jax.live_arrays()))
        return real(*args)

    monkeypatch.setattr(loop, "_agree", agree)
    run = runners(ladder)["ppo"]
    with pytest.raises(Interrupted):
        run(tmp_path, stop=StopAfter(3))
    started, before = held[-1], len(held)
    run(tmp_path, stop=StopRequest())
    params = sum(np.asarray(x).nbytes for x in jax.tree.leaves(params_of(tmp_path)))
    assert held[before + 1] < started + params, "after a step, when what is trained has been given up"


def test_a_finished_run_is_left_alone(ladder, tmp_path):
    before = (pathlib.Path(ladder.sft) / "metrics.jsonl").stat().st_mtime_ns
    sft.run(SFT, ladder.sft, stop=StopRequest())
    assert (pathlib.Path(ladder.sft) / "metrics.jsonl").stat().st_mtime_ns == before


def test_metrics_written_after_the_last_checkpoint_are_written_again_not_twice(ladder, tmp_path):
    """What kill -9 leaves: rows of metrics, and a torn one, beyond the newest checkpoint."""
    sft.run(SFT, tmp_path / "whole", stop=StopRequest())
    with pytest.raises(Interrupted):
        sft.run(SFT, tmp_path / "killed", stop=StopAfter(2))
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 123.0}\n{"step": 5, "lo')
    sft.run(SFT, tmp_path / "killed", stop=StopRequest())
    assert (tmp_path / "killed" / "metrics.jsonl").read_text() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_text()


@pytest.mark.parametrize(
    "damage",
    [
        "truncated",
        pytest.param("flipped", marks=pytest.mark.slow),
        pytest.param("missing", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(damage, ladder, tmp_path, caplog):
    sft.run(SFT, tmp_path / "whole", stop=StopRequest())
    with pytest.raises(Interrupted):
        sft.run(SFT, tmp_path / "run", stop=StopAfter(3))
    newest = tmp_path / "run" / "checkpoints" / "3"
    hurt(newest, damage)
    with pytest.raises(Interrupted):
        sft.run(SFT, tmp_path / "run", stop=StopAfter(1))
    # Resumed from 2 (saved by schedule), and stopped at 3 again: the damaged one is out of the way.
    assert newest.with_name("damaged.3").exists() and newest.exists()
    sft.run(SFT, tmp_path / "run", stop=StopRequest())
    assert any(
        str(newest) in record.getMessage() and "damaged" in record.getMessage() for record in caplog.records
    )
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path / "run"), params_of(tmp_path / "whole"))


def test_no_whole_checkpoint_is_an_error_that_deletes_nothing(ladder, tmp_path):
    with pytest.raises(Interrupted):
        sft.run(SFT, tmp_path / "run", stop=StopAfter(1))
    hurt(tmp_path / "run" / "checkpoints" / "1", "truncated")
    files = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"no checkpoint in .* is whole .*checkpoints/1.*SHA-256"):
        sft.run(SFT, tmp_path / "run", stop=StopRequest())
    assert [file for file in files if not file.exists()] == []


def test_a_damaged_handoff_is_refused(ladder, tmp_path):
    sft.run(SFT, tmp_path / "sft", stop=StopRequest())
    hurt(tmp_path / "sft" / "handoff" / "params", "flipped")
    with pytest.raises(InputError, match="hand-off .* is damaged .*does not match its SHA-256"):
        dpo.run(DPO, tmp_path / "dpo", init_from=str(tmp_path / "sft"), stop=StopRequest())
    assert not (tmp_path / "dpo" / "metrics.jsonl").exists()


def hurt(directory: pathlib.Path, damage: str) -> None:
    """Damages the largest file below ``directory``."""
    file = max(
        (path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        file.unlink()


def test_updates_that_are_never_finite_end_the_run_and_name_the_rows(ladder, tmp_path):
    config = dataclasses.replace(
        SFT,
        optimizer=OptimizerConfig(learning_rate=1e38, schedule="constant"),
        schedule=Schedule(num_steps=40, save_every=1),
    )
    expected = (
        r"not finite in the last 10 updates, up to step 1\d, whose batch held world:demonstrations/\d+, .* and 8 more; "
        r"step \d is saved in .*checkpoints; lower --config.optimizer.learning_rate"
    )
    with pytest.raises(InputError, match=expected):
        sft.run(config, tmp_path / "run", stop=StopRequest())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(row.get("skipped_updates", 0) for row in rows) == 9, "the tenth is in no row: it ended the run"
