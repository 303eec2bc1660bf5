"""Kills a stage with -9 again and again, runs it to its end, and compares with the run that nobody disturbed.

    python -m tests.system.soak --stage=sft --kills=20                       # one stage; all: --stage=all
    python -m tests.system.soak --stage=ppo --kills=20 --seed=3 --workdir=/tmp/soak

Moments are drawn from the seed: anywhere, while a checkpoint is being written, or at the beginning of an iteration,
when a stage that samples is sampling. Final parameters are compared bit by bit, and the rows of metrics.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import tempfile
import time
from collections.abc import Callable

from absl import app, flags, logging

# Stage -> those that it starts from, and those in turn.
STAGES = {
    "sft": (),
    "reward_model": ("sft",),
    "dpo": ("sft",),
    "ppo": ("sft", "reward_model"),
    "grpo": ("sft", "reward_model"),
    "online_dpo": ("sft", "reward_model"),
    "rejection": ("sft", "reward_model"),
}
# The children start as copies of a process that has imported all this, and has not touched a device.
PRELOAD = [*(f"rlhf_jax.stages.{stage}" for stage in STAGES), "tests.stages.conftest"]
KINDS = ("anywhere", "saving", "beginning")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
    """When to kill: after ``rows`` new rows of metrics and then ``fraction`` of a step, or of a save (``kind``)."""

    kind: str
    rows: int
    fraction: float


def draw(seed: str, kills: int, steps: int) -> list[Moment]:
    """The moments of one soak: each after some progress, so that all of them fit into a run of ``steps`` steps."""
    rng, most = random.Random(seed), max(steps // (kills + 1), 1)
    return [
        Moment(kind=rng.choice(KINDS), rows=rng.randint(1, most), fraction=rng.random()) for _ in range(kills)
    ]


def run_stage(stage: str, root: str, workdir: str, steps: int, cache: str) -> None:
    """One stage on a tiny model, from the undisturbed runs below ``root``."""
    os.environ["XLA_FLAGS"] = ""
    import jax

    from rlhf_jax.training.interrupt import StopRequest
    from rlhf_jax.training.loop import Schedule
    from tests.stages.conftest import DPO, PPO, REWARD, SFT, SHARED

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    module = importlib.import_module(f"rlhf_jax.stages.{stage}")
    configs = {"sft": SFT, "reward_model": REWARD, "dpo": DPO, "ppo": PPO}
    config = configs[stage] if stage in configs else module.Config(**SHARED, group_size=4)
    short = {"schedule": Schedule(num_steps=steps, save_every=2), "batch_size": 8}
    if "num_eval_prompts" in type(config).__dataclass_fields__:
        short["num_eval_prompts"] = 8
    names = zip(("init_from", "reward_from"), STAGES[stage], strict=False)
    start = {name: f"{root}/{needed}" for name, needed in names}
    module.run(dataclasses.replace(config, **short), workdir, stop=StopRequest(), **start)


def rows_of(workdir: pathlib.Path) -> list[str]:
    path = workdir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def soak(
    stage: str, root: pathlib.Path, *, kills: int, steps: int, seed: str, cache: str, say: Callable
) -> None:
    """Kills ``stage`` at ``kills`` moments and compares its end with ``root/<stage>``.

    ``root`` holds the undisturbed runs of the stages that this one starts from; its own is made where it is missing.

    Raises:
      AssertionError: the ends differ.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    for needed in (*STAGES[stage], stage):
        if not (root / needed / "handoff").exists():
            child = context.Process(
                target=run_stage, args=(needed, str(root), str(root / needed), steps, cache)
            )
            child.start()
            child.join()
            assert child.exitcode == 0, f"the undisturbed {needed} ended with {child.exitcode}"
    workdir = root / f"{stage}.disturbed"
    for moment in draw(f"{seed}/{stage}", kills, steps):
        # A run that was done before the moment came is one more undisturbed run; the next one is caught earlier.
        for rows in (moment.rows, 1, 1, 1):
            child = context.Process(target=run_stage, args=(stage, str(root), str(workdir), steps, cache))
            child.start()
            struck = _kill(child, workdir, dataclasses.replace(moment, rows=rows), say)
            child.join()
            if struck:
                break
            assert child.exitcode == 0, f"{stage} ended with {child.exitcode} instead of going on"
            compare(root / stage, workdir)
            shutil.rmtree(workdir)
        assert struck, f"{stage} is done before {moment} comes"
    child = context.Process(target=run_stage, args=(stage, str(root), str(workdir), steps, cache))
    child.start()
    child.join()
    assert child.exitcode == 0, f"{stage} ended with {child.exitcode} instead of going on"
    compare(root / stage, workdir)


def _kill(child, workdir: pathlib.Path, moment: Moment, say: Callable) -> bool:
    """Waits for the moment and kills; whether the child was still there."""
    # What is beyond the newest checkpoint is cut off when the run goes on, so rows are waited for by their number.
    seen, times = None, [time.monotonic()]
    while child.is_alive() and len(times) <= moment.rows + 1:
        now = rows_of(workdir)
        if now != seen:
            seen = now
            times.append(time.monotonic())
        time.sleep(0.002)
    step = (times[-1] - times[-2]) if len(times) > 2 else 0.1
    if moment.kind == "saving":
        folder, end = workdir / "checkpoints", time.monotonic() + 5
        while child.is_alive() and time.monotonic() < end and not any(folder.glob("*orbax-checkpoint-tmp*")):
            time.sleep(0.0005)
        time.sleep(0.05 * moment.fraction)
    else:
        time.sleep(min(step, 5.0) * moment.fraction * (0.3 if moment.kind == "beginning" else 1.0))
    alive = child.is_alive()
    child.kill()
    newest = seen[-1][:40] if seen else "nothing"
    say(f"killed {workdir.name} ({moment.kind}, after {newest}...)" if alive else f"{workdir.name} was done")
    return alive


def compare(expected: pathlib.Path, found: pathlib.Path) -> None:
    """Parameters bit by bit, and the rows of metrics.

    Raises:
      AssertionError: they differ.
    """
    import jax
    import numpy as np

    from rlhf_jax import checkpoints

    ours, theirs = (checkpoints.restore_params(checkpoints.handoff_path(path)) for path in (found, expected))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert rows_of(found) == rows_of(expected), f"{found} and {expected} have other rows of metrics"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    root = pathlib.Path(WORKDIR.value or tempfile.mkdtemp(prefix="soak."))
    for stage in STAGES if STAGE.value == "all" else (STAGE.value,):
        started = time.monotonic()
        soak(
            stage,
            root,
            kills=KILLS.value,
            steps=2 * KILLS.value + 4,
            seed=str(SEED.value),
            cache=str(root / "compiled"),
            say=print,
        )
        found = {
            "stage": stage,
            "kills": KILLS.value,
            "bitwise": True,
            "seconds": round(time.monotonic() - started),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    STAGE = flags.DEFINE_enum("stage", "all", [*STAGES, "all"], "Which stage is killed.")
    KILLS = flags.DEFINE_integer("kills", 20, "How often.")
    SEED = flags.DEFINE_integer("seed", 0, "What the moments are drawn from.")
    WORKDIR = flags.DEFINE_string(
        "workdir", None, "Where the runs lie; by default a new temporary directory."
    )
    app.run(main)
