"""Every method from one SFT policy and one reward model, measured on the same prompts with the same judge.

    python -m experiments.quickstart --workdir=runs/quickstart
    python -m experiments.methods --quickstart=runs/quickstart --workdir=runs/methods

Runs GRPO, RLOO, online DPO, iterative DPO and rejection-sampling fine-tuning (--methods names some of them), takes
PPO and offline DPO from the quickstart, and prints proxy, gold and KL of all, with best-of-n. Run again, it
resumes; a finished method is left alone. Fields: --config.<method>.*, and --config.evaluate.*.
"""

from __future__ import annotations

import json
import shutil
import sys
import time

from absl import flags

from experiments import launch, table
from rlhf_jax import checkpoints, storage
from rlhf_jax.errors import InputError
from rlhf_jax.evaluation import report
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages import config as configs
from rlhf_jax.stages import evaluate, grpo, online_dpo, rejection

METHODS = {
    "grpo": grpo,
    "rloo": grpo,
    "online_dpo": online_dpo,
    "iterative_dpo": online_dpo,
    "rft": rejection,
}

CONFIG = launch.define_config("methods")
WORKDIR = launch.define_workdir()
QUICKSTART = flags.DEFINE_string(
    "quickstart", None, "Directory of a finished quickstart: SFT, reward model, PPO and DPO.", required=True
)
NAMES = flags.DEFINE_list("methods", list(METHODS), "Which methods to run.")
PARALLELISM = launch.define_parallelism()
MESH = launch.define_mesh()


def main(stop):
    mesh = meshes.make_mesh(MESH.value)
    unknown = sorted(set(NAMES.value) - set(METHODS))
    if unknown:
        raise InputError(f"--methods has {unknown[0]!r}; the methods are {', '.join(METHODS)}")
    config, workdir = CONFIG.value.to_dict(), storage.local_path(WORKDIR.value)
    start = storage.local_path(QUICKSTART.value)
    shared = {"seed": config["seed"], "data": config["data"]}
    where = {"init_from": str(start / "sft"), "reward_from": str(start / "reward_model")}
    for name in NAMES.value:
        if checkpoints.is_finished(workdir / name):
            print(f"{name} is finished in {workdir / name}", file=sys.stderr)
            continue
        stage = METHODS[name]
        built = configs.from_dict(stage.Config, {**config[name], **shared}, f"config.{name}")
        started = time.monotonic()
        stage.run(
            built,
            workdir / name,
            **where,
            parallelism=PARALLELISM.value,
            mesh=mesh,
            stop=stop,
        )
        report.write_report(workdir / name)
        print(f"{name} took {time.monotonic() - started:.0f} s", file=sys.stderr)
    policies = {name: str(start / name) for name in ("ppo", "dpo")} | {
        name: str(workdir / name) for name in METHODS if checkpoints.is_finished(workdir / name)
    }
    # Derived from the methods, and quick: measured anew, never kept beside policies that have changed.
    shutil.rmtree(workdir / "evaluate", ignore_errors=True)
    summary = evaluate.run(
        configs.from_dict(evaluate.Config, {**config["evaluate"], **shared}, "config.evaluate"),
        workdir / "evaluate",
        reference_from=where["init_from"],
        reward_from=where["reward_from"],
        policies_from=policies,
        mesh=mesh,
        stop=stop,
    )
    (workdir / "summary.json").write_text(json.dumps(summary, indent=1))
    print(table.policies(summary))


if __name__ == "__main__":
    launch.launch(main)
