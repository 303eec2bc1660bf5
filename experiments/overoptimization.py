"""The over-optimisation lab: gold against sqrt(KL) for best-of-n and PPO, by proxy, with fitted curves and their peaks.

    python -m experiments.quickstart --workdir=runs/quickstart
    python -m experiments.overoptimization --quickstart=runs/quickstart --workdir=runs/overoptimization

Trains proxies on fewer pairs than the quickstart's reward model, a small one, and two ensembles, from one trunk and
from four; samples 1,024 responses a prompt from the SFT policy and scores them with every proxy, with the labellers'
own taste and with gold; optimises a policy against every proxy by PPO; fits the curves of Gao, Schulman & Hilton
(2023). The quickstart's own reward model ("pairs_49k") and PPO runs join in. Leaves overoptimization.json,
overoptimization.html and a PNG for each picture. Run again, it resumes; fields: --config.<part>.*. What came out:
docs/overoptimization.md.
"""

from __future__ import annotations

import dataclasses
import json

from absl import flags

from experiments import launch
from experiments import overoptimization_lab as lab
from rlhf_jax import checkpoints, storage
from rlhf_jax.errors import InputError
from rlhf_jax.evaluation import overoptimization_page as page
from rlhf_jax.evaluation.ensemble_errors import shared_errors
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages import best_of_n, ppo

CONFIG = launch.define_config("overoptimization")
WORKDIR = launch.define_workdir()
QUICKSTART = flags.DEFINE_string(
    "quickstart", None, "Directory of a finished quickstart: SFT, reward model, PPO with and without its leash.",
    required=True,
)  # fmt: skip
PARALLELISM = launch.define_parallelism()
MESH = launch.define_mesh()


def main(stop):
    config, workdir = CONFIG.value.to_dict(), storage.local_path(WORKDIR.value)
    start = storage.local_path(QUICKSTART.value)
    missing = [
        name
        for name in ("sft", "reward_model", "ppo", "ppo_no_leash")
        if not checkpoints.is_finished(start / name)
    ]
    if missing:
        raise InputError(
            f"--quickstart={start} has no finished run {missing[0]!r}; run experiments.quickstart there first"
        )
    for part, names in lab.DRAWN.items():
        absent = sorted(set(names) - set(config[part]))
        if absent:
            raise InputError(
                f"config.{part} has no {absent[0]!r}, which is drawn; it needs {', '.join(names)}"
            )
    mesh = meshes.make_mesh(MESH.value)
    how = {"parallelism": PARALLELISM.value, "mesh": mesh, "stop": stop}
    proxies = {lab.FULL: start / "reward_model"} | lab.train_proxies(config, workdir, start, how)
    scores = best_of_n.run(
        lab.built(best_of_n.Config, config, config["best_of_n"], "config.best_of_n"),
        workdir / "best_of_n",
        policy_from=str(start / "sft"),
        rewards_from={name: str(path) for name, path in proxies.items()},
        mesh=mesh,
        stop=stop,
    )
    runs = {"no_leash": start / "ppo_no_leash", "leash": start / "ppo"}
    for name, changes in config["policies"].items():
        runs[name] = workdir / f"ppo_{name}"
        where = {"init_from": str(start / "sft"), "reward_from": str(proxies[changes["proxy"]])}
        fields = {**config["ppo"], "beta": changes["beta"], "scoring": changes["scoring"]}
        ppo.run(lab.built(ppo.Config, config, fields, f"config.policies.{name}"), runs[name], **where, **how)
    penalty = config["policies"]["mean_minus_variance"]["scoring"]["penalty"]
    summary = page.write(
        workdir,
        sections=[*lab.sections_of_best_of_n(scores, penalty=penalty), *lab.sections_of_runs(runs)],
        kl_of_best_of_n=lab.kl_of_best_of_n(scores[lab.FULL], scores["log_prob"]),
        seed=config["seed"],
    )
    print(json.dumps(summary["peaks"], indent=1))
    for name in ("ensemble_8k", "trunks_8k"):
        # The best hundredth of each prompt's responses.
        top = max(2, scores[name].shape[2] // 100)
        shared = shared_errors(scores[name], scores["labeller"], top=top)
        print(f"what the members of {name} share: {json.dumps(dataclasses.asdict(shared))}")
    lab.print_kl(summary["kl_of_best_of_n"])
    print(workdir / page.PAGE)


if __name__ == "__main__":
    launch.launch(main)
