"""Holds finished quickstart runs against its promises: a line each, exit status 1 if one is broken.

python -m experiments.check_seeds runs/seed0 runs/seed1 runs/seed2
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from absl import app

from rlhf_jax.metrics import read_metrics


def promises(workdir: pathlib.Path) -> Iterator[tuple[str, bool, str]]:
    """(promise, kept, numbers) of one run."""
    summary = json.loads((workdir / "summary.json").read_text())
    reward, policies = summary["reward_model"], summary["policies"]
    gap = reward["bayes_accuracy"] - reward["accuracy"]
    yield "reward model within 0.02 of the Bayes ceiling", gap <= 0.02, f"gap {gap:.4f}"
    sft, spread = policies["sft"]["gold"], policies["sft"]["gold_std"]
    gain, kl = (policies["ppo"]["gold"] - sft) / spread, policies["ppo"]["kl"]
    yield (
        "PPO: gold up by 1 standard deviation at KL below 15",
        gain >= 1 and kl < 15,
        f"{gain:.2f} at {kl:.2f} nats",
    )
    gain = (policies["dpo"]["gold"] - sft) / spread
    yield "DPO: gold up by 0.5 standard deviations", gain >= 0.5, f"{gain:.2f}"
    yield _goodhart(policies["ppo_no_leash"]["curve"])
    first = next(row for row in read_metrics(workdir / "ppo" / "metrics.jsonl") if "kl" in row)
    yield "KL at PPO step 0 below 1e-5", abs(first["kl"]) < 1e-5, f"{first['kl']:.1e}"


def _goodhart(curve: list[dict[str, Any]]) -> tuple[str, bool, str]:
    """Without the leash proxy ends above where gold peaked, while gold loses 30% or more of what it had gained."""
    gold, proxy = [point["gold"] for point in curve], [point["proxy"] for point in curve]
    peak = max(range(len(gold)), key=gold.__getitem__)
    gained, lost = gold[peak] - gold[0], gold[peak] - gold[-1]
    kept = gained > 0 and lost >= 0.3 * gained and proxy[-1] > proxy[peak]
    numbers = (
        f"gold {gold[0]:.2f} -> {gold[peak]:.2f} (iteration {curve[peak]['iteration']}) -> {gold[-1]:.2f}, "
        f"proxy {proxy[0]:.2f} -> {proxy[peak]:.2f} -> {proxy[-1]:.2f}"
    )
    return "no leash: gold falls by 30% of its gain while proxy rises", kept, numbers


def main(argv: list[str]) -> None:
    broken = 0
    for name in argv[1:]:
        for promise, kept, numbers in promises(pathlib.Path(name)):
            print(f"{name}: {'kept  ' if kept else 'BROKEN'} {promise}: {numbers}")
            broken += not kept
    sys.exit(1 if broken or len(argv) < 2 else 0)


if __name__ == "__main__":
    app.run(main)
