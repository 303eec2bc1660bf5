"""Two real processes of four devices each are one job: the numbers of one process, and one end for both."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.training.interrupt import Interrupted, StopRequest
from tests.stages.conftest import StopAfter

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.slow
STAGES = ("sft", "reward_model", "dpo", "ppo")


def start(workdir: pathlib.Path) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    command = [sys.executable, "-m", "tests.system.hosts_job", f"--workdir={workdir}", "--distributed"]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(command, cwd=ROOT, env=environment | {"JAX_PROCESS_ID": str(number)}, **streams)
        for number in range(2)
    ]


def wait_for_row(workdir: pathlib.Path, step: int, processes: list[subprocess.Popen]) -> None:
    while all(process.poll() is None for process in processes):
        if [row for row in rows(workdir, "sft") if row["step"] >= step]:
            return
        time.sleep(0.02)
    raise AssertionError([process.communicate()[1] for process in processes])


def ends(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    said = [process.communicate(timeout=240)[1] for process in processes]
    return [(process.returncode, err) for process, err in zip(processes, said, strict=True)]


def rows(workdir: pathlib.Path, stage: str) -> list[dict]:
    path = workdir / stage / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job that lost a process and then went on to the end: (its directory, what both runs ended in)."""
    workdir = tmp_path_factory.mktemp("two")
    begin_alone(workdir)
    processes = start(workdir)
    wait_for_row(workdir, 7, processes)
    processes[1].kill()
    killed = ends(processes)
    return workdir, killed, ends(start(workdir))


def begin_alone(workdir: pathlib.Path) -> None:
    """What one process with half of the devices leaves of SFT when it is stopped after six steps.

    Rows of metrics up to there are kept by whoever goes on, and written anew by whoever starts over: the mark says.
    """
    from tests.system import hosts_job

    with pytest.raises(Interrupted, match="saved step 6 of 16"):
        hosts_job.go_on(workdir, StopAfter(6), meshes.data_mesh(4))
    first, *rest = rows(workdir, "begun")
    lines = [json.dumps(row) + "\n" for row in (first | {"begun_alone": 1.0}, *rest)]
    (workdir / "begun" / "metrics.jsonl").write_text("".join(lines))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> pathlib.Path:
    from tests.system import hosts_job

    workdir = tmp_path_factory.mktemp("one")
    hosts_job.run(workdir, StopRequest(), meshes.data_mesh(8))
    return workdir


def test_what_stops_one_process_saves_on_all_at_the_same_step(job):
    first, second = ((job[0] / f"said.{number}").read_text() for number in range(2))
    assert first == second and "SIGTERM: saved step 2 of 16 in" in first


def test_a_lost_process_ends_the_job_with_a_clear_message(job):
    (status, said), killed = job[1]
    assert killed[0] == -signal.SIGKILL
    # Ours where a sum over devices fails; JAX's own where it notices the silence first.
    if status == 1:
        assert "error: process 0 of 2 has lost another one of this job" in said
        assert "run the same command again on every host" in said
    else:
        assert status == -signal.SIGABRT and "another task died" in said, said


def test_two_processes_give_the_numbers_of_one(job, alone):
    """Of which one was killed on the way; to the tolerance of sums in another order."""
    workdir, _, ended = job
    assert [status for status, _ in ended] == [0, 0], ended
    for stage in STAGES:
        check_same(rows(workdir, stage), rows(alone, stage))
        assert (workdir / stage / "handoff" / "handoff.json").exists()


def check_same(rows: list[dict], expected_rows: list[dict]) -> None:
    """Rows differ by no more than rounding makes of them; the absolute part is for what is nearly 0."""
    assert [row["step"] for row in rows] == [row["step"] for row in expected_rows]
    for row, expected in zip(rows, expected_rows, strict=True):
        assert _smooth(row) == pytest.approx(_smooth(expected), rel=1e-4, abs=5e-6), expected["step"]


def test_what_two_processes_saved_one_goes_on_with(job, alone, tmp_path):
    from tests.system import hosts_job

    workdir = shutil.copytree(job[0] / "stopped", tmp_path / "sft")
    config = dataclasses.replace(hosts_job.SFT, schedule=hosts_job.LONG)
    hosts_job.sft.run(config, workdir, mesh=meshes.data_mesh(8), stop=StopRequest())
    check_same(rows(tmp_path, "sft"), rows(alone, "sft"))


def test_what_one_process_saved_two_go_on_with(job, alone):
    first, *rest = rows(job[0], "begun")
    assert first.pop("begun_alone") == 1.0, "they have started over"
    check_same([first, *rest], rows(alone, "sft"))


def _smooth(row: dict) -> dict:
    """Without what counts signs: before its first update DPO's margins are 0 but for rounding."""
    return {name: value for name, value in row.items() if "accuracy" not in name}


def test_each_process_reads_its_half_of_the_rows(job, alone):
    whole = np.load(alone / "read.0.npy")
    halves = [np.load(job[0] / f"read.{number}.npy") for number in range(2)]
    assert [len(half) for half in halves] == [8, 8]
    np.testing.assert_array_equal(np.concatenate(halves), whole)
