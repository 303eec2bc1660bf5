"""SFT, reward model, DPO and PPO on a tiny model as one command; the tests run it in one process and in two.

python -m tests.system.hosts_job --workdir=<directory> [--distributed]
"""

import dataclasses
import pathlib

import jax
import numpy as np

from experiments import launch
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages import dpo, ppo, reward_model, sft
from rlhf_jax.training.interrupt import Interrupted, StopRequest
from rlhf_jax.training.loop import Schedule
from tests.stages.conftest import DPO, PPO, REWARD, SFT, StopAfter

SHORT = Schedule(num_steps=2, save_every=2)
# Long enough to be stopped on its way, twice.
LONG = Schedule(num_steps=16, save_every=5)


def run(workdir: pathlib.Path, stop, mesh=None) -> None:
    """The four stages; ``read.<process>.npy``: the tokens that this process has read of the first batch of all."""
    place, kept = meshes.put_own_rows, workdir / f"read.{jax.process_index()}.npy"

    def keep(mesh, batch):
        if not kept.exists():
            np.save(kept, np.asarray(batch.tokens))
        return place(mesh, batch)

    meshes.put_own_rows = keep
    try:
        _run(workdir, mesh, stop)
    finally:
        meshes.put_own_rows = place


def _run(workdir: pathlib.Path, mesh, stop) -> None:
    start = {"init_from": str(workdir / "sft"), "mesh": mesh, "stop": stop}
    short = {"schedule": SHORT, "batch_size": 8}
    sft.run(dataclasses.replace(SFT, schedule=LONG), workdir / "sft", mesh=mesh, stop=stop)
    reward_model.run(dataclasses.replace(REWARD, **short), workdir / "reward_model", **start)
    dpo.run(dataclasses.replace(DPO, **short), workdir / "dpo", **start)
    short |= {"num_epochs": 1, "num_minibatches": 1, "num_eval_prompts": 8}
    config = dataclasses.replace(PPO, **short)
    ppo.run(config, workdir / "ppo", reward_from=str(workdir / "reward_model"), **start)


def go_on(workdir: pathlib.Path, stop, mesh=None) -> None:
    """SFT in ``begun``, which one process alone has begun where it is there already."""
    sft.run(dataclasses.replace(SFT, schedule=LONG), workdir / "begun", mesh=mesh, stop=stop)


def stop_on_one(workdir: pathlib.Path) -> None:
    """SFT that the last process alone is asked to stop; what each says goes to ``said.<process>``."""
    said = workdir / f"said.{jax.process_index()}"
    if said.exists():
        return
    asked_here = jax.process_index() == jax.process_count() - 1
    try:
        stop = StopAfter(2) if asked_here else StopRequest()
        sft.run(dataclasses.replace(SFT, schedule=LONG), workdir / "stopped", stop=stop)
    except Interrupted as interrupted:
        said.write_text(str(interrupted))


def main(stop) -> None:
    workdir = pathlib.Path(WORKDIR.value)
    stop_on_one(workdir)
    run(workdir, stop)
    go_on(workdir, stop)


if __name__ == "__main__":
    WORKDIR = launch.define_workdir()
    launch.define_distributed()
    launch.launch(main)
