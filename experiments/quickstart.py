"""The whole ladder: demonstrations -> SFT -> reward model -> PPO with and without its leash, DPO, best-of-n -> report.

    python -m experiments.quickstart --workdir=runs/quickstart

Each stage starts from the files of the one before (workdir/sft, workdir/reward_model, ...), and from nothing
else. Run the same command again and finished stages are left alone, a killed one resumes. --stages=ppo runs
that stage alone; if it was finished, its old directory is kept aside as ppo.1, ppo.2, ... At the end: a table,
summary.json and report.html.

The same ladder on a model and preferences of your own:

    python -m experiments.quickstart --workdir=runs/mine --config=experiments/configs/arguments.py \\
        --config.model.path=<Hugging Face directory> --config.data.path=pairs.jsonl.gz

Fields: --config.seed, --config.data.*, --config.model.* for all stages, and --config.<stage>.* for one; the --help of
experiments.sft, reward_model, ppo, dpo and evaluate lists them.
"""

from __future__ import annotations

import time

from absl import flags

from experiments import ladder, launch, table
from rlhf_jax import storage
from rlhf_jax.evaluation import plots, report
from rlhf_jax.parallel import mesh as meshes

CONFIG = launch.define_config("quickstart")
WORKDIR = launch.define_workdir()
STAGES = flags.DEFINE_list(
    "stages",
    list(ladder.STAGES),
    "Which stages to run, in ladder order, finished or not; the default is all that are not finished. Whenever all "
    "have run, they are evaluated anew.",
)
PARALLELISM = launch.define_parallelism()
MESH = launch.define_mesh()


def main(stop):
    started, workdir = time.monotonic(), storage.local_path(WORKDIR.value)
    explicit = bool(flags.FLAGS["stages"].present)

    def run(stages):
        ladder.run(
            CONFIG.value.to_dict(),
            workdir,
            stages=stages,
            again=explicit,
            parallelism=PARALLELISM.value,
            mesh=meshes.make_mesh(MESH.value),
            stop=stop,
        )

    run([name for name in STAGES.value if name != "evaluate"])
    problems = ladder.unfit(workdir)
    if problems:
        print(
            f"no comparison yet: {'; '.join(problems)}; name those with --stages, or none for all that are missing"
        )
        return
    run(["evaluate"])
    summary = ladder.write_summary(workdir)
    page = report.write_report(workdir)
    plots.save_overview(workdir, workdir / "overview.png")
    print(table.ladder(summary))
    print(f"\n{time.monotonic() - started:.0f} s; {page} and {workdir / 'summary.json'}")


if __name__ == "__main__":
    launch.launch(main)
