"""What the over-optimisation lab found, over seeds: Markdown tables of means and ranges. Imports the standard library.

    make three-seeds lab    # three quickstarts, the lab on each, and then this:
    python -m experiments.overoptimization_seeds runs/lab0 runs/lab1 runs/lab2

A cell is the mean over the labs and, in brackets, the least and the greatest of them; "-" where a lab has no such
number (its KL never came so far, or its curve has no peak within what was measured). See docs/overoptimization.md.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import app

SUMMARY = "overoptimization.json"


def over(values: Sequence[float | None]) -> str:
    """Mean (least to greatest); how many there are where some are missing."""
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    text = f"{sum(there) / len(there):.2f} ({min(there):.2f} to {max(there):.2f})"
    return text if len(there) == len(values) else f"{text}, {len(there)} of {len(values)}"


def peak_kl(course: dict[str, Any]) -> float | None:
    """Nats at which the fitted curve peaks, where that lies within what was measured."""
    fit = course["fit"]
    return fit["peak_distance"] ** 2 if fit is not None and fit["peak_seen"] else None


def tables(labs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A table for each section that the labs share: a row a way to optimise, its peak, and gold at some KLs."""
    for key, section in labs[0]["courses"].items():
        kls = list(next(iter(section.values()))["gold_at_kl"])
        head = ["", "fitted peak, nats", "greatest gold", "at nats", *(f"gold at {kl}" for kl in kls)]
        lines = [f"## {key}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for name in section:
            courses = [lab["courses"][key][name] for lab in labs]
            cells = [
                name,
                over([peak_kl(course) for course in courses]),
                over([course["greatest_gold"] for course in courses]),
                over([course["greatest_gold_kl"] for course in courses]),
                *(over([course["gold_at_kl"][kl] for course in courses]) for kl in kls),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        yield "\n".join(lines)


def main(argv: list[str]) -> None:
    if len(argv) < 2:
        sys.exit(
            "give the directories of finished labs: python -m experiments.overoptimization_seeds runs/lab0 …"
        )
    missing = [name for name in argv[1:] if not (pathlib.Path(name) / SUMMARY).exists()]
    if missing:
        sys.exit(f"{missing[0]} has no {SUMMARY}; run experiments.overoptimization there first")
    print("\n\n".join(tables([json.loads((pathlib.Path(name) / SUMMARY).read_text()) for name in argv[1:]])))


if __name__ == "__main__":
    app.run(main)
