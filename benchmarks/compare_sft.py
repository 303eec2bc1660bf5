"""Ours and TRL's SFT in turn, in one run, and the median of the paired ratios.

    python -m benchmarks.compare_sft --trl_python=<python with trl> --rounds=5

Each side is a fresh process; the two alternate so that whatever else the machine does falls on both.
"""

import json
import statistics
import subprocess
import sys

from absl import app, flags

TRL_PYTHON = flags.DEFINE_string("trl_python", None, "Interpreter with trl==1.16.0 and torch.", required=True)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Pairs of measurements.")
BATCH = flags.DEFINE_integer("batch", 8, "Rows a step.")
SEQ = flags.DEFINE_integer("seq", 256, "Tokens a row.")
STEPS = flags.DEFINE_integer("steps", 5, "Measured steps a process.")


def measure(command):
    shape = [f"--batch={BATCH.value}", f"--seq={SEQ.value}", f"--steps={STEPS.value}"]
    finished = subprocess.run([*command, *shape], capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{finished.stderr}")
    return json.loads(finished.stdout.splitlines()[-1])


def main(_):
    ratios, memory = [], []
    for _ in range(ROUNDS.value):
        ours = measure([sys.executable, "-m", "benchmarks.speed", "--task=sft"])
        theirs = measure([TRL_PYTHON.value, "benchmarks/trl_sft.py"])
        print(json.dumps(ours), json.dumps(theirs), sep="\n", flush=True)
        ratios.append(ours["tokens_per_s"] / theirs["tokens_per_s"])
        memory.append(ours["peak_rss_gib"] / theirs["peak_rss_gib"])
    print(
        json.dumps(
            {
                "speed_ratio_median": round(statistics.median(ratios), 3),
                "speed_ratio_min": round(min(ratios), 3),
                "speed_ratio_max": round(max(ratios), 3),
                "peak_rss_ratio_median": round(statistics.median(memory), 3),
            }
        )
    )


if __name__ == "__main__":
    app.run(main)
