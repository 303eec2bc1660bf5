"""What the peers' runners share: command line and JSON line. Imports shapes only, for peers' environments."""

import argparse
import json
import resource
import statistics

from benchmarks.shapes import SIZES

# Steps that are not measured: the first compile, or fill pools.
WARM_UP = 2


def arguments_of(description, tasks):
    """The command line: task, shape, and how many steps are measured."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--task", default="sft", choices=list(tasks))
    parser.add_argument("--size", default="tiny", choices=sorted(SIZES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    return parser.parse_args()


def print_result(library, arguments, seconds, tokens, **versions):
    """One line: the median of what came after the warm-up. seconds: of every step; tokens: of one."""
    median = statistics.median(seconds[WARM_UP : WARM_UP + arguments.steps])
    shape = {name: getattr(arguments, name) for name in ("task", "size", "batch", "seq", "new")}
    measured = {
        "median_s": round(median, 4),
        "tokens_per_s": round(tokens / median, 1),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
    }
    print(json.dumps({"library": library, **shape, **measured, **versions}))
