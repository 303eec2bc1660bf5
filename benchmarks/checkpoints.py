"""What a checkpoint costs: how long a save holds up the loop, until it is on disk, and going on from it; one JSON line.

    python -m benchmarks.checkpoints --steps=8 --saves=10 --between=1

The step is that of ``benchmarks.speed --task=sft --size=tiny --batch=8 --seq=256``. step_s: the median step, no save
under way. blocks_s: the median time that ``save`` takes to return, and blocks_share what that is of a step. slows_s: by
how much the ``--between`` steps that follow, during which it is written, take longer than as many undisturbed ones (of
a machine whose cores compute, writing takes some of them). on_disk_s: the median from the call until files and digests
are there, with no step beside it. resume_s: from the start of a new process to the end of its first step, less
compilation (compile_s: tracing, lowering, and compiling or reading from the cache) and less one step; of it imports_s
until the library is loaded, and restore_s for finding, checking and reading the newest checkpoint. load: what else was
running at the start (os.getloadavg, one minute).
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

_STARTED = time.time()

import grain  # noqa: E402  the clock starts before what takes seconds to load
import jax  # noqa: E402
from absl import app, flags, logging  # noqa: E402

from benchmarks import speed  # noqa: E402
from benchmarks.shapes import SIZES  # noqa: E402
from experiments import launch  # noqa: E402
from rlhf_jax.checkpoints import Checkpoints  # noqa: E402
from rlhf_jax.models import decoder  # noqa: E402
from rlhf_jax.models.config import ModelConfig  # noqa: E402
from rlhf_jax.stages import sft  # noqa: E402

_LOADED = time.time()

SAVES = flags.DEFINE_integer("saves", 10, "Measured saves of each kind.", lower_bound=1)
BETWEEN = flags.DEFINE_integer("between", 3, "Steps between two saves.", lower_bound=1)
RESUME_FROM = flags.DEFINE_string(
    "resume_from", "", "Only go on from the run of this directory, as the whole does in a process of its own."
)


def numbers() -> grain.DatasetIterator:
    """An iterator whose position is saved; what it yields is not looked at."""
    return iter(grain.MapDataset.range(1000).repeat().to_iter_dataset(grain.ReadOptions(num_threads=0)))


def sft_step():
    """(``take(state) -> state``, which waits for the step, and the first state)."""
    model = ModelConfig(**SIZES["tiny"], max_length=speed.SEQ.value)
    batch = speed.random_rows(
        speed.np.random.default_rng(0),
        speed.BATCH.value,
        speed.SEQ.value,
        model.vocab_size,
        response=speed.SEQ.value - 1,
    )
    params = decoder.init_params(model, jax.random.key(0))
    return speed.supervised_step(sft.make_objective(model), params, {}, batch)


def seconds_of(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure_saves(workdir: pathlib.Path) -> dict[str, float]:
    """Everything but resuming; leaves the checkpoints in ``workdir``."""
    take, state = sft_step()
    holder = {"state": state}

    def step() -> None:
        holder["state"] = take(holder["state"])

    for _ in range(speed.WARM_UP):
        step()
    saver, iterator = Checkpoints(workdir), numbers()
    names = iter(range(1, 10_000))
    save = lambda: saver.save(next(names), holder["state"], iterator, {})  # noqa: E731
    save()  # the first of a process starts threads
    saver.wait()
    alone = [seconds_of(step) for _ in range(speed.STEPS.value)]
    blocked, beside = [], []
    for _ in range(SAVES.value):
        step()
        blocked.append(seconds_of(save))
        beside.append(sum(seconds_of(step) for _ in range(BETWEEN.value)))
        saver.wait()
    until_written = [seconds_of(lambda: (save(), saver.wait())) for _ in range(SAVES.value)]
    saver.close()
    alone_s = statistics.median(alone)
    return {
        "step_s": alone_s,
        "blocks_s": statistics.median(blocked),
        "blocks_share": statistics.median(blocked) / alone_s,
        "slows_s": statistics.median(beside) - BETWEEN.value * alone_s,
        "on_disk_s": statistics.median(until_written),
    }


def go_on(workdir: pathlib.Path) -> dict[str, float]:
    """What a new process needs until it has taken a step from the newest checkpoint of ``workdir``."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(seconds) if event.startswith(_COMPILATION) else None
    )
    launch.enable_compilation_cache()
    take, state = sft_step()
    saver = Checkpoints(workdir)
    started = time.perf_counter()
    _, state, _ = saver.restore_newest(state, numbers())
    restored = time.perf_counter()
    take(state)
    ended = time.time()
    saver.close()
    return {
        "ended_at": ended,
        "compile_s": sum(compiled),
        "imports_s": _LOADED - _STARTED,
        "restore_s": restored - started,
    }


# JAX's names of the time it takes to trace, lower and compile.
_COMPILATION = "/jax/core/compile/"


# Flags that benchmarks.speed defines and whose values are fixed here.
_FIXED = (speed.TASK, speed.SIZE, speed.DTYPE, speed.NEW)


def main(_):
    given = [f"--{holder.name}" for holder in _FIXED if holder.present]
    if given:
        told = "the step is that of SFT at the shape tiny in float32; leave them away"
        print(f"error: {', '.join(given)}: not for benchmarks.checkpoints, where {told}", file=sys.stderr)
        sys.exit(2)
    logging.set_verbosity(logging.WARNING)
    if RESUME_FROM.value:
        print(json.dumps(go_on(pathlib.Path(RESUME_FROM.value))))
        return
    launch.enable_compilation_cache()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as directory:
        found = measure_saves(pathlib.Path(directory))
        started = time.time()
        command = [sys.executable, "-m", "benchmarks.checkpoints", f"--resume_from={directory}"]
        command += [f"--batch={speed.BATCH.value}", f"--seq={speed.SEQ.value}"]
        child = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    whole = child.pop("ended_at") - started
    found["resume_s"] = whole - child["compile_s"] - found["step_s"]
    found |= child | {"load": load}
    told = {name: round(value, 4) for name, value in found.items()}
    print(json.dumps({"task": "checkpoints", "size": "tiny", **told, "device": jax.devices()[0].device_kind}))


if __name__ == "__main__":
    app.run(main)
