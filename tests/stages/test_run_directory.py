"""What a run's directory and its inputs may be."""

import dataclasses

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.stages import run_directory
from rlhf_jax.training.interrupt import StopRequest


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0


@pytest.mark.parametrize(
    ("workdir", "inputs"), [("s3://bucket/run", {}), ("run", {"init_from": "s3://bucket/sft"})]
)
def test_a_url_is_refused_before_anything_is_written(workdir, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"s3://bucket/\w+ is a URL, and here a directory is needed .*; mount"
    ):
        run_directory.open_run(
            workdir, "sft", Config(), inputs=inputs, parallelism="jit", mesh=None, stop=StopRequest()
        )
    assert not list(tmp_path.iterdir())
