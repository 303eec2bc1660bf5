"""Stages in a bucket: stopped, resumed, finished, and started from; the same bits as on a disk."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest

from rlhf_jax import checkpoints
from rlhf_jax.errors import InputError
from rlhf_jax.evaluation import report
from rlhf_jax.evaluation.report_files import read_run
from rlhf_jax.stages import dpo, evaluate, sft
from rlhf_jax.stages.run_directory import changed_inputs
from rlhf_jax.storage import at
from rlhf_jax.training.interrupt import Interrupted, StopRequest

from .conftest import DATA, DPO, SFT, StopAfter


def params_of(run):
    return checkpoints.restore_params(checkpoints.handoff_path(run))


@pytest.mark.slow
def test_a_run_in_a_bucket_ends_in_the_bits_of_one_on_a_disk(bucket, ladder, tmp_path):
    run = f"{bucket.url}/runs/sft"
    for steps in (1, 1):
        with pytest.raises(
            Interrupted, match=rf"saved step \d of 4 in {re.escape(bucket.url)}/runs/sft/checkpoints"
        ):
            sft.run(SFT, run, stop=StopAfter(steps))
        assert not checkpoints.is_finished(run)
    sft.run(SFT, run, stop=StopRequest())
    jax.tree.map(np.testing.assert_array_equal, params_of(run), params_of(ladder.sft))
    on_disk = pathlib.Path(ladder.sft)
    for name in ("metrics.jsonl", "data.json", "config.json"):
        found = bucket.objects[f"runs/sft/{name}"].content
        assert found == (on_disk / name).read_bytes(), name
    assert report.write_report(run) == at(run) / report.REPORT
    page = bucket.objects["runs/sft/report.html"].content.decode()
    assert page == report.run_page(read_run(on_disk))
    assert any(name.startswith("runs/sft/tensorboard/events") for name in bucket.objects)

    # Finished: nothing is written again. Another config: refused, and what is there stays.
    changes = len(bucket.log)
    sft.run(SFT, run, stop=StopRequest())
    with pytest.raises(
        InputError, match=rf"workdir {re.escape(bucket.url)}/runs/sft belongs to a run with another config"
    ):
        dpo.run(DPO, run, init_from=ladder.sft, stop=StopRequest())
    assert {name for name, _ in bucket.log[changes:]} <= {"runs/sft/config.json"}

    # The next stage starts from it, on a disk and in the bucket, as from the one on the disk.
    dpo.run(DPO, tmp_path / "from_disk", init_from=ladder.sft, stop=StopRequest())
    dpo.run(DPO, tmp_path / "from_bucket", init_from=run, stop=StopRequest())
    dpo.run(DPO, f"{bucket.url}/runs/dpo", init_from=run, stop=StopRequest())
    for place in (tmp_path / "from_bucket", f"{bucket.url}/runs/dpo"):
        jax.tree.map(np.testing.assert_array_equal, params_of(place), params_of(tmp_path / "from_disk"))
        made_from = checkpoints.load_handoff(place)[0].made_from
        assert made_from == [run]
        assert changed_inputs(at(place)) == []
    config = json.loads(bucket.objects["runs/dpo/config.json"].content)
    assert config["inputs"]["init_from"]["path"] == run

    # What is measured of it, there too.
    place = f"{bucket.url}/runs/evaluate"
    summary = evaluate.run(
        evaluate.Config(data=DATA, num_prompts=12, batch_size=8, num_shown=2),
        place,
        reference_from=run,
        reward_from=ladder.reward_model,
        policies_from={"dpo": f"{bucket.url}/runs/dpo"},
        stop=StopRequest(),
    )
    assert json.loads(bucket.objects["runs/evaluate/summary.json"].content) == summary
    assert report.write_report(place) == at(place) / report.REPORT


def test_what_a_bucket_cannot_be_started_from(bucket, tmp_path):
    bucket.write("model/config.json", b"{}")
    with pytest.raises(
        InputError,
        match=r"there is no run at gs://bucket\w+/model, and Hugging Face directories are read from disks; give .* cp",
    ):
        dpo.run(DPO, tmp_path / "dpo", init_from=f"{bucket.url}/model", stop=StopRequest())
    bucket.refuse = ("config.json",)
    with pytest.raises(
        InputError, match=r"cannot write to workdir gs://bucket\w+/dpo: .*; give a writable one"
    ):
        dpo.run(DPO, f"{bucket.url}/dpo", init_from=f"{bucket.url}/model", stop=StopRequest())
