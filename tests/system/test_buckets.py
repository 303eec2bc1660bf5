"""Real processes on a bucket of this machine: killed in the middle, run again, and started from."""

import signal
import time

import jax
import numpy as np
import pytest

from rlhf_jax import checkpoints

from .test_command_line import SFT, TINY_WORLD, params_of, run, start

pytestmark = pytest.mark.slow


def wait_for(bucket, part: str) -> None:
    for _ in range(6000):
        if any(part in name for name in list(bucket.objects)):
            return
        time.sleep(0.02)
    raise AssertionError(f"{part} was never written; there are {sorted(bucket.objects)}")


def test_killed_and_run_again_in_a_bucket_ends_in_the_bits_of_a_run_on_a_disk(bucket, tmp_path):
    sft = [*SFT, "--config.schedule.num_steps=60"]
    place = f"{bucket.url}/sft"
    process = start(*sft, f"--workdir={place}")
    # Of the third checkpoint something is there, and nothing that says that it is whole.
    wait_for(bucket, "sft/checkpoints/21/")
    process.kill()
    _, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, err
    assert not checkpoints.is_finished(place)
    for workdir in (place, tmp_path / "sft"):
        finished = run(*sft, f"--workdir={workdir}")
        assert finished.returncode == 0, finished.stderr
    jax.tree.map(np.testing.assert_array_equal, params_of(place), params_of(tmp_path / "sft"))
    assert bucket.objects["sft/metrics.jsonl"].content == (tmp_path / "sft" / "metrics.jsonl").read_bytes()
    dpo = ["dpo", *TINY_WORLD, "--config.batch_size=8", "--config.schedule.num_steps=2"]
    finished = run(*dpo, f"--init_from={place}", f"--workdir={bucket.url}/dpo")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == f"{bucket.url}/dpo/report.html"
    assert checkpoints.load_handoff(f"{bucket.url}/dpo")[0].made_from == [place]
