"""A small ladder on disk, laid out as the stages leave theirs, with numbers chosen by hand."""

import json
import pathlib

import pytest

# (step, KL, proxy, gold) of every evaluation. On the leash gold gains 2 and keeps it; off it, 3 are lost of 2 gained.
LEASHED = ((0, 0.0, -0.5, 1.0), (10, 1.0, 0.25, 2.0), (20, 4.0, 0.75, 3.0))
UNLEASHED = ((0, 0.0, -0.5, 1.0), (10, 4.0, 1.25, 3.0), (20, 25.0, 2.75, 0.0))
COLUMNS = ("proxy", "kl", "length", "distinct_2", "terminated", "gold", "gold_std")
NUMBERS = {
    "sft": (-0.5, 0.0, 12.25, 0.4375, 1.0, 1.0, 2.0),
    "ppo": (0.7512345, 4.0123456, 18.5, 0.25, 1.0, 3.0, 1.5),
    "ppo_no_leash": (2.75, 25.0, 47.0, 0.0625, 0.125, 0.0, 1.0),
    "dpo": (0.375, 2.25, 16.0, 0.3125, 1.0, 2.0, 1.75),
    "best_of_n": (0.875, 1.8350887222397811, 15.0, 0.375, 1.0, 1.75, 2.0),
}
POLICIES = {name: dict(zip(COLUMNS, values, strict=True)) for name, values in NUMBERS.items()}
POLICIES["best_of_n"]["n"] = 16
REWARD_MODEL = {
    "accuracy": 0.8125,
    "bayes_accuracy": 0.828125,
    "longer_wins": 0.703125,
    "calibration_error": 0.015625,
}
RELIABILITY = [
    {"confidence": 0.5625, "accuracy": 0.5, "count": 2},
    {"confidence": 0.75, "accuracy": 0.8125, "count": 2},
]


def _write_json(path: pathlib.Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _write_run(directory: pathlib.Path, *, stage: str, rows, config, parts, facts) -> None:
    data = {"world": {"seed": 7, "length_bias": 0.3}, "path": ""}
    shared = {"seed": 5, "data": data, "schedule": {"num_steps": rows[-1]["step"]}, "batch_size": 32}
    _write_json(directory / "config.json", {"stage": stage, "config": shared | config, "inputs": {}})
    report = {part: {"kept": kept, "dropped": [], "truncated": []} for part, kept in parts.items()}
    _write_json(directory / "data.json", {"unreadable": [], **report})
    handoff = {
        "model": {"vocab_size": 178, "width": 64, "num_layers": 2},
        "facts": facts,
        "code_version": "9.8.7",
    }
    _write_json(directory / "handoff" / "handoff.json", handoff)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _ppo_rows(course):
    evaluations = {
        step: {"eval/kl": kl, "eval/proxy": proxy, "eval/gold": gold, "eval/length": 12.0 + step}
        for step, kl, proxy, gold in course
    }
    rows = [{"step": 0, **evaluations[0]}]
    for step in range(1, course[-1][0] + 1):
        kept = {"kl": step / 8, "proxy": step / 16, "gold": step / 32, "length": 12.0 + step}
        loss = {"loss": 1 / step, "loss/policy": -1 / step, "loss/value": 2 / step}
        rows.append({"step": step, **kept, **loss, **evaluations.get(step, {})})
    return rows


def _samples(name: str):
    measured = {"kl": 1.0, "length": 9, "terminated": name != "ppo_no_leash"}
    return [
        {
            "prompt": prompt,
            "response": f"{name} answers {prompt}",
            "proxy": 0.5 + index,
            "gold": -0.25 - index,
        }
        | measured
        for index, prompt in enumerate(("praise the music", "blame the plot"))
    ]


@pytest.fixture
def ladder(tmp_path) -> pathlib.Path:
    """The directory of a finished ladder in the embedded world."""
    root = tmp_path / "small_ladder"
    steps = range(1, 31)
    sft = [{"step": 0, "eval/nll": 5.0}, *({"step": n, "loss": 5 / n, "nll": 5 / n} for n in steps)]
    sft[-1]["eval/nll"] = 0.1875
    pairs = [{"step": n, "loss": 0.75 - n / 100, "accuracy": 0.5 + n / 100} for n in steps]
    both = {"train": 3687, "held_out": 409}
    _write_run(root / "sft", stage="sft", rows=sft, config={"model": {"path": ""}}, parts=both, facts={})
    _write_run(
        root / "reward_model", stage="reward_model", rows=pairs, config={}, parts=both, facts=REWARD_MODEL
    )
    _write_run(root / "dpo", stage="dpo", rows=pairs, config={"beta": 0.1}, parts=both, facts={})
    for name, course, beta in (("ppo", LEASHED, 0.05), ("ppo_no_leash", UNLEASHED, 0.0)):
        rows, prompts = _ppo_rows(course), {"train": 4096}
        _write_run(root / name, stage="ppo", rows=rows, config={"beta": beta}, parts=prompts, facts={})
    margins = {"margins": [0.5, -0.25, 2.0, 0.125], "reliability": RELIABILITY}
    _write_json(root / "reward_model" / "margins.json", margins)
    _write_json(root / "evaluate" / "config.json", {"stage": "evaluate", "config": {"seed": 5}, "inputs": {}})
    _write_json(root / "evaluate" / "summary.json", POLICIES)
    _write_json(root / "evaluate" / "samples.json", {name: _samples(name) for name in POLICIES})
    summary = {"reward_model": REWARD_MODEL, "policies": POLICIES, "seconds": {"sft": 14.0, "ppo": 61.0}}
    _write_json(root / "summary.json", summary)
    return root
