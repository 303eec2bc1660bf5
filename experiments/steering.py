"""A pretrained model of stories steered towards a happy tone by PPO, GRPO and DPO, against a lexicon's reward.

    python -m experiments.steering --init_from=<Hugging Face directory of stories260K> --workdir=runs/steering

Writes prompts (beginnings of stories) into the workdir, trains PPO, GRPO and online DPO on a leash to the model they
start from, and DPO on pairs that the model said and the lexicon labelled. Measures what they say: sentiment, KL, and
the first model's perplexity. Leaves steering.png (sentiment against KL, during training), summary.json and
samples.json. Run again, it resumes; fields: --config.<method>.*. What came out: docs/steering.md.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping

import numpy as np

from experiments import launch
from experiments.configs.steering import DPO_STEPS
from rlhf_jax import storage
from rlhf_jax.data.prompts_of_stories import beginnings
from rlhf_jax.evaluation import plots_overoptimization as drawing
from rlhf_jax.evaluation import plots_style as style
from rlhf_jax.metrics import read_metrics
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.stages import config as configs
from rlhf_jax.stages import dpo, grpo, online_dpo, ppo, steering

METHODS = {"ppo": ppo, "grpo": grpo, "online_dpo": online_dpo}
# What the picture calls them.
LABELS = {"ppo": "ppo", "grpo": "GRPO", "online_dpo": "online DPO", "dpo": "dpo"}

CONFIG = launch.define_config("steering")
WORKDIR = launch.define_workdir()
INIT_FROM = launch.define_init_from("Hugging Face directory, or run directory of SFT: what is steered.")
PARALLELISM = launch.define_parallelism()
MESH = launch.define_mesh()


def main(stop):
    config, workdir = CONFIG.value.to_dict(), storage.local_path(WORKDIR.value)
    prompts = workdir / "prompts.jsonl"
    if not prompts.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"prompt": text}) for text in beginnings()]
        prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = {**config["data"], "path": str(prompts), "format": "prompts"}
    shared = {"seed": config["seed"], "data": data}
    mesh = meshes.make_mesh(MESH.value)
    how = {"parallelism": PARALLELISM.value, "mesh": mesh, "stop": stop}
    for name, stage in METHODS.items():
        built = configs.from_dict(stage.Config, {**config[name], **shared}, f"config.{name}")
        stage.run(built, workdir / name, init_from=INIT_FROM.value, **how)
    pairs = steering.write_pairs(
        configs.from_dict(steering.PairsConfig, {**config["pairs"], **shared}, "config.pairs"),
        workdir / "pairs",
        first_from=INIT_FROM.value,
        mesh=mesh,
        stop=stop,
    )
    # A response of the model's own has no end mark unless it fits with one: what does not is cut, not refused.
    of_pairs = {"path": str(pairs), "format": "preferences", "truncation": "keep_start"}
    for name in DPO_STEPS:
        fields = {**config[name], "seed": config["seed"], "data": {**config["data"], **of_pairs}}
        built = configs.from_dict(dpo.Config, fields, f"config.{name}")
        dpo.run(built, workdir / name, init_from=INIT_FROM.value, **how)
    summary = steering.run(
        configs.from_dict(steering.Config, {**config["measure"], **shared}, "config.measure"),
        workdir / "measure",
        first_from=INIT_FROM.value,
        policies_from={name: str(workdir / name) for name in [*METHODS, *DPO_STEPS]},
        mesh=mesh,
        stop=stop,
    )
    draw(workdir, summary)
    columns = ("sentiment", "sentiment_error", "kl", "perplexity", "length", "distinct_2")
    print(f"{'':12}" + "".join(f"{name:>17}" for name in columns))
    for name, values in summary.items():
        print(f"{name:12}" + "".join(f"{number(values[column]):>17}" for column in columns))
    print(workdir / "steering.png")


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def draw(workdir: pathlib.Path, summary: Mapping[str, Mapping[str, float]]) -> None:
    """Sentiment gained against KL on one picture: at the evaluations of each run, and at the end of each of DPO."""
    courses = {}
    for name in METHODS:
        rows = [row for row in read_metrics(workdir / name / "metrics.jsonl") if "eval/proxy" in row]
        gained = [row["eval/proxy"] - rows[0]["eval/proxy"] for row in rows]
        distance = [math.sqrt(max(row["eval/kl"], 0.0)) for row in rows]
        courses[LABELS[name]] = (np.array(distance), np.array(gained))
    runs = [summary[name] for name in ("first", *DPO_STEPS)]
    courses[LABELS["dpo"]] = (
        np.sqrt(np.maximum([found["kl"] for found in runs], 0.0)),
        np.array([found["sentiment"] - runs[0]["sentiment"] for found in runs]),
    )
    figure = drawing.reward_figure(courses, style.looks(courses), label="sentiment gained")
    with style.settings():
        figure.savefig(workdir / "steering.png", dpi=144, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    launch.launch(main)
