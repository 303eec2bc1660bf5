"""A stage that is killed with -9 ends in the same bits; the moments are drawn from the commit's hash."""

import pathlib
import subprocess

import pytest

from tests.system import soak

ROOT = pathlib.Path(__file__).parents[2]


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "no repository"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("soak")


@pytest.mark.slow
@pytest.mark.parametrize("stage", soak.STAGES)
def test_killed_twice_it_ends_in_the_same_bits(stage, root):
    said: list[str] = []
    cache = str(ROOT / ".cache" / "jax")
    soak.soak(stage, root, kills=2, steps=8, seed=commit(), cache=cache, say=said.append)
    assert sum(line.startswith("killed") for line in said) == 2, said


def test_moments_are_drawn_from_the_seed_and_leave_room_for_all():
    first, again, other = (soak.draw(seed, 20, 44) for seed in ("a/sft", "a/sft", "b/sft"))
    assert first == again != other
    assert {moment.kind for moment in first} == set(soak.KINDS)
    assert sum(moment.rows for moment in first) <= 44
