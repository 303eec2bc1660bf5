"""How a main ends, told by its exit status."""

import os
import pathlib
import subprocess
import sys

import pytest

STOPPED = """
from experiments import launch
from rlhf_jax.training.interrupt import Interrupted

def main(stop):
    raise Interrupted("SIGTERM: saved step 3 of 9")

launch.launch(main)
"""


@pytest.mark.parametrize(
    ("wanted", "status", "said"),
    [
        (None, 0, "SIGTERM: saved step 3 of 9\n"),
        ("75", 75, "SIGTERM: saved step 3 of 9\n"),
        ("soon", 2, "error: RLHF_JAX_INTERRUPTED_STATUS='soon'; give a whole number from 0 to 255\n"),
    ],
)
def test_a_run_stopped_on_request_ends_with_the_status_that_its_scheduler_wants(wanted, status, said):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RLHF_JAX_")}
    if wanted is not None:
        environment["RLHF_JAX_INTERRUPTED_STATUS"] = wanted
    done = subprocess.run(
        [sys.executable, "-c", STOPPED],
        cwd=pathlib.Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (status, said)


def test_a_directory_to_write_is_no_url(tmp_path):
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.quickstart", "--workdir=gs://bucket/run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: gs://bucket/run is a URL, "), done.stderr
    assert not list(tmp_path.iterdir())
