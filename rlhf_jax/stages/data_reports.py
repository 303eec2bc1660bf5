"""What a run shows of its data while they are scanned, and counts of them once that is done; imports run_directory."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator

import tqdm

from rlhf_jax.parallel import hosts
from rlhf_jax.stages.run_directory import Run
from rlhf_jax.training.interrupt import Interrupted


def counts(run: Run) -> dict[str, float]:
    """How many rows the run's ``data.json`` says were left out ("data/left_out"), cut ("data/truncated"), and repeated
    the prompt of another where each is used once ("data/repeated").

    Both sides of the split together; without what there is none of. Of several processes, the one that writes metrics
    reads the file, and the others answer {}.
    """
    if not hosts.is_main():
        return {}
    path = run.workdir / "data.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"unreadable": []}
    unreadable, sides = found.pop("unreadable"), found.values()
    counts = {
        "data/left_out": float(len(unreadable) + sum(len(side["dropped"]) for side in sides)),
        "data/truncated": float(sum(len(side["truncated"]) for side in sides)),
        "data/repeated": float(sum(side["repeated"] for side in sides)),
    }
    return {name: count for name, count in counts.items() if count}


@contextlib.contextmanager
def shown_scan(run: Run) -> Iterator[Callable[[int, int], None]]:
    """A bar while a prepared set is scanned, or a line where there is no terminal; a request to stop ends it."""
    terminal = sys.stderr.isatty()
    with tqdm.tqdm(desc=f"{run.stage}: scan", unit=" rows", delay=0.5, disable=not terminal) as bar:

        def progress(rows: int, total: int) -> None:
            if 0 < rows < total and run.stop.requested is not None:
                raise Interrupted(
                    f"{run.stop.requested}: stopped while the data was scanned, before any training; run the same "
                    "command again"
                )
            if rows == 0 and not terminal:
                print(f"{run.stage}: scans {total:,} rows, once for all runs", file=sys.stderr, flush=True)
            bar.total = total
            bar.update(rows - bar.n)

        yield progress
