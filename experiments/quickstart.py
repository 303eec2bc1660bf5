"""The whole ladder: demonstrations -> SFT -> reward model -> PPO with and without its leash, DPO, best-of-n -> report.

    python -m experiments.quickstart --workdir=runs/quickstart

Each stage starts from the files of the one before (workdir/sft, workdir/reward_model, ...), and from nothing
else. Run the same command again and finished stages are left alone, a killed one resumes. --stages=ppo runs
that stage alone; if it was finished, its old directory is kept aside as ppo.1, ppo.2, ... At the end: a table,
summary.json and report.html.

The same ladder on a model and preferences of your own:

    python -m experiments.quickstart --workdir=runs/mine --config=experiments/configs/arguments.py \\
        --config.model.path=<Hugging Face directory> --config.data.path=pairs.jsonl.gz
"""

from __future__ import annotations

import pathlib
import time

from absl import flags

from experiments import ladder, launch, table
from rlhf_jax.evaluation import plots, report

CONFIG = launch.define_config("quickstart")
WORKDIR = launch.define_workdir()
STAGES = flags.DEFINE_list(
    "stages", list(ladder.STAGES), "Which stages to run, in ladder order; the default is all of them."
)
PARALLELISM = launch.define_parallelism()


def main(stop):
    started, workdir = time.monotonic(), pathlib.Path(WORKDIR.value)
    explicit = flags.FLAGS["stages"].present
    ladder.run(
        CONFIG.value.to_dict(),
        workdir,
        stages=STAGES.value,
        again=explicit,
        parallelism=PARALLELISM.value,
        stop=stop,
    )
    if not ladder.is_complete(CONFIG.value.to_dict(), workdir):
        print(f"not every stage has run yet; without --stages the rest follows, then the report in {workdir}")
        return
    summary = ladder.write_summary(workdir)
    page = report.write_report(workdir)
    plots.save_overview(workdir, workdir / "overview.png")
    print(table.ladder(summary))
    print(f"\n{time.monotonic() - started:.0f} s; {page} and {workdir / 'summary.json'}")


if __name__ == "__main__":
    launch.launch(main)
