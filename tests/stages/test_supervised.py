"""How rows become batches is an option of each stage that learns from fixed rows, and a resumed run keeps to it."""

import dataclasses
import json
import multiprocessing
import pathlib

import jax
import numpy as np
import pytest

from rlhf_jax import checkpoints
from rlhf_jax.data import batches, prepared, scans, world
from rlhf_jax.errors import InputError
from rlhf_jax.evaluation import report
from rlhf_jax.stages import evaluate, grpo, inputs, prompts, reward_model, sft, steering, supervised
from rlhf_jax.stages.handoffs import load_model
from rlhf_jax.stages.inputs import BatchConfig, DataConfig
from rlhf_jax.stages.run_directory import open_run
from rlhf_jax.training.interrupt import Interrupted, StopRequest
from rlhf_jax.training.loop import Schedule

from .conftest import REWARD, SFT, SHARED, WORLD, StopAfter


def params_of(workdir):
    return checkpoints.restore_params(checkpoints.handoff_path(pathlib.Path(workdir)))


def assert_same_run(one: pathlib.Path, other: pathlib.Path) -> None:
    jax.tree.map(np.testing.assert_array_equal, params_of(one), params_of(other))
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> pathlib.Path:
    """A file of the embedded world's pairs, and beside it the set prepared from it."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = world.preferences(WORLD, "train")
    lines = [{"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in rows]
    path.write_text("\n".join(map(json.dumps, lines)))
    prepared.prepare(path, "preferences", path.with_suffix(""))
    return path


@pytest.mark.slow
def test_packed_sft_with_a_worker_process_resumes_in_mid_epoch_as_if_undisturbed(ladder, pairs, tmp_path):
    def config(path, **batches):
        return dataclasses.replace(
            SFT,
            model=sft.ModelSource(path=ladder.sft),
            data=DataConfig(path=str(path)),
            schedule=Schedule(num_steps=3, save_every=2),
            batches=BatchConfig(**batches),
            batch_size=8,
            pack=True,
        )

    # Without workers from the file, with one from the prepared set.
    sft.run(config(pairs), tmp_path / "whole", stop=StopRequest())
    working = config(pairs.with_suffix(""), num_workers=1)
    with pytest.raises(Interrupted, match="saved step 1 of 3"):
        sft.run(working, tmp_path / "halves", stop=StopAfter(1))
    sft.run(working, tmp_path / "halves", stop=StopRequest())
    assert not multiprocessing.active_children()
    assert_same_run(tmp_path / "halves", tmp_path / "whole")
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    # No demonstration alone has more than 47 tokens.
    assert all(row["tokens"] > 8 * 48 for row in rows[1:])


def test_a_request_to_stop_ends_a_scan_before_any_training(ladder, pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scans, "_CHUNK", 16)
    data = DataConfig(path=str(pairs.with_suffix("")), prompt_length=15)
    config = dataclasses.replace(SFT, model=sft.ModelSource(path=ladder.sft), data=data)
    with pytest.raises(
        Interrupted, match="SIGTERM: stopped while the data was scanned, before any training; run"
    ):
        sft.run(config, tmp_path, stop=StopAfter(1))
    assert "sft: scans 64 rows, once for all runs" in capsys.readouterr().err
    assert not list(pairs.with_suffix("").glob("scan-*partial*"))
    supervised.encode_split(*_opened(config, tmp_path))
    assert capsys.readouterr().err.count("scans 64 rows") == 1
    supervised.encode_split(*_opened(config, tmp_path))
    assert capsys.readouterr().err == ""


def _opened(config, workdir):
    run = open_run(workdir, "sft", config, inputs={}, parallelism="jit", mesh=None, stop=StopRequest())
    model = load_model(config.model.path, run)
    return run, config.data, model, inputs.load_demonstrations(config.data), batches.encode_demonstrations


def test_prompts_of_a_prepared_set_are_those_of_its_file(ladder, pairs, tmp_path, monkeypatch, capsys):
    """Also those of every evaluation, in whole rounds; the scan is shown, and ends on request."""
    monkeypatch.setattr(scans, "_CHUNK", 16)
    found = {}
    for path in (pairs, pairs.with_suffix("")):
        data = DataConfig(path=str(path), prompt_length=14)
        run, _, model, *_ = _opened(
            dataclasses.replace(SFT, model=sft.ModelSource(path=ladder.sft)), tmp_path
        )
        how = {"num_eval_prompts": 3, "responses_per_prompt": 2}
        if not found:
            found[path] = prompts.encode_prompts(run, data, model, **how)
            continue
        with pytest.raises(Interrupted, match="stopped while the data was scanned"):
            prompts.encode_prompts(dataclasses.replace(run, stop=StopAfter(1)), data, model, **how)
        capsys.readouterr()
        found[path] = prompts.encode_prompts(run, data, model, **how)
        assert "sft: scans 64 rows, once for all runs" in capsys.readouterr().err
    of_file, of_set = found.values()
    for one, other in zip(of_file, of_set, strict=True):
        assert list(one.rows) == list(other.rows)
    asked = [row.row.prompt for row in of_set[1].rows]
    assert len(set(asked)) == 3 and asked == asked[:3] * 2


def test_grpo_on_a_prepared_set_is_grpo_on_its_file(ladder, pairs, tmp_path):
    """Prompts that pairs share are counted, in data.json, in the metrics and in the report."""
    workdirs = {pairs: tmp_path / "file", pairs.with_suffix(""): tmp_path / "set"}
    for path, workdir in workdirs.items():
        config = grpo.Config(
            **SHARED | {"data": DataConfig(path=str(path)), "schedule": Schedule(num_steps=1)},
            group_size=4,
            reward="sentiment",
            num_eval_prompts=4,
            eval_responses_per_prompt=2,
        )
        grpo.run(config, workdir, init_from=ladder.sft, stop=StopRequest())
    assert_same_run(*workdirs.values())
    rows = world.preferences(WORLD, "train")
    repeated = len(rows) - len({row.prompt for row in rows})
    assert repeated > 0
    sides = json.loads((workdirs[pairs] / "data.json").read_text())
    assert sum(sides[side]["repeated"] for side in ("train", "held_out")) == repeated
    written = [json.loads(line) for line in (workdirs[pairs] / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in written if "eval/kl" in row]
    assert evaluated and all(row["data/repeated"] == repeated for row in evaluated)
    report.write_report(workdirs[pairs])
    assert "Repeated" in (workdirs[pairs] / "report.html").read_text()


def test_policies_are_measured_on_a_prepared_set_as_on_its_file(ladder, pairs, tmp_path):
    found = {}
    for path in (pairs, pairs.with_suffix("")):
        data = DataConfig(path=str(path))
        how = {"data": data, "num_prompts": 3, "responses_per_prompt": 2, "batch_size": 16}
        measured = evaluate.run(
            evaluate.Config(best_of=2, **how),
            tmp_path / "evaluate" / path.name,
            reference_from=ladder.sft,
            reward_from=ladder.reward_model,
            policies_from={},
            stop=StopRequest(),
        )
        workdir = tmp_path / "steering" / path.name
        steered = steering.run(
            steering.Config(**how), workdir, first_from=ladder.sft, policies_from={}, stop=StopRequest()
        )
        found[path] = (measured, steered, json.loads((workdir / "data.json").read_text()))
        assert found[path][2]["prompts"]["kept"] == 3
    assert found[pairs] == found[pairs.with_suffix("")]


def test_buckets_resume_and_other_data_is_refused(ladder, pairs, tmp_path):
    config = dataclasses.replace(REWARD, data=DataConfig(path=str(pairs)), batches=BatchConfig(num_buckets=2))

    def run(name, stop):
        reward_model.run(config, tmp_path / name, init_from=ladder.sft, stop=stop)

    run("whole", StopRequest())
    with pytest.raises(Interrupted, match="saved step 1 of 4"):
        run("halves", StopAfter(1))
    was = pairs.read_text()
    lines = was.splitlines()
    pairs.write_text("\n".join([*lines[1:], json.dumps(json.loads(lines[0]) | {"chosen": "warm"})]))
    with pytest.raises(InputError, match="position in the data is of another order .*: go on with the data"):
        run("halves", StopRequest())
    assert (tmp_path / "halves" / "checkpoints" / "1").exists()  # nothing is called damaged
    pairs.write_text(was)
    run("halves", StopRequest())
    assert_same_run(tmp_path / "halves", tmp_path / "whole")
