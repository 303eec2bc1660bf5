"""Our steps and a peer's in turn, in one run, and the median of the paired ratios.

    python -m benchmarks.compare --peer=trl --peer_python=<python with trl==1.16.0> --tasks=sft,dpo,rm,grpo,gen
    python -m benchmarks.compare --peer=trl --peer_python=<python with trl==1.12.0> --tasks=ppo
    python -m benchmarks.compare --peer=tunix --peer_python=<python with tunix> --tasks=sft,dpo,grpo,ppo,gen

Each side is a fresh process; the two alternate so that whatever else the machine does falls on both. Shapes: sft 8 rows
of 256; dpo 4 pairs of 256, half of it prompt; rm 8 pairs of 256; grpo, ppo and gen 16 rows of 64 + 64. It prints two
JSON lines a round, and one a task at the end.
"""

import json
import statistics
import subprocess
import sys

from absl import app, flags

SHAPES = {
    "sft": {"batch": 8, "seq": 256},
    "dpo": {"batch": 4, "seq": 256},
    "rm": {"batch": 8, "seq": 256},
    "grpo": {"batch": 16, "seq": 128, "new": 64},
    "ppo": {"batch": 16, "seq": 128, "new": 64},
    "gen": {"batch": 16, "seq": 128, "new": 64},
}
PEER = flags.DEFINE_enum("peer", "trl", ["trl", "tunix"], "Whose steps: benchmarks/<peer>_steps.py.")
PEER_PYTHON = flags.DEFINE_string(
    "peer_python", None, "Interpreter in which the peer is installed.", required=True
)
TASKS = flags.DEFINE_list("tasks", ["sft", "dpo", "grpo", "gen"], "Which tasks.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Pairs of measurements a task.")
STEPS = flags.DEFINE_integer("steps", 5, "Measured steps a process.")


def measure(command, task):
    shape = [f"--{name}={value}" for name, value in SHAPES[task].items()]
    command = [*command, f"--task={task}", *shape, f"--steps={STEPS.value}"]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{finished.stderr}")
    return json.loads(finished.stdout.splitlines()[-1])


def compare(task):
    pairs = []
    for _ in range(ROUNDS.value):
        ours = measure([sys.executable, "-m", "benchmarks.speed"], task)
        theirs = measure([PEER_PYTHON.value, f"benchmarks/{PEER.value}_steps.py"], task)
        print(json.dumps(ours), json.dumps(theirs), sep="\n", flush=True)
        pairs.append((ours, theirs))
    ratios = [ours["tokens_per_s"] / theirs["tokens_per_s"] for ours, theirs in pairs]
    return {
        "task": task,
        "peer": PEER.value,
        "ours_tokens_per_s": statistics.median(ours["tokens_per_s"] for ours, _ in pairs),
        "theirs_tokens_per_s": statistics.median(theirs["tokens_per_s"] for _, theirs in pairs),
        "speed_ratio_median": round(statistics.median(ratios), 3),
        "speed_ratio_min": round(min(ratios), 3),
        "speed_ratio_max": round(max(ratios), 3),
        "peak_rss_ratio_median": round(
            statistics.median(ours["peak_rss_gib"] / theirs["peak_rss_gib"] for ours, theirs in pairs), 3
        ),
    }


def main(_):
    unknown = sorted(set(TASKS.value) - set(SHAPES))
    if unknown:
        sys.exit(f"--tasks has {unknown[0]!r}; the tasks are {', '.join(SHAPES)}")
    found = [compare(task) for task in TASKS.value]
    for line in found:
        print(json.dumps(line))


if __name__ == "__main__":
    app.run(main)
