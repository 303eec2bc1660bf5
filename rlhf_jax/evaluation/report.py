"""Writes ``report.html``, what a run or a ladder of runs looks like to a person. Imports the other report modules.

One self-contained file: drawings inline, no script, nothing fetched. The same files give the same page, byte for byte.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from rlhf_jax import storage
from rlhf_jax.evaluation import plots_style
from rlhf_jax.evaluation import report_html as page
from rlhf_jax.evaluation import report_parts as parts
from rlhf_jax.evaluation.report_files import Run, is_run, read_ladder, read_run
from rlhf_jax.evaluation.report_html import text
from rlhf_jax.evaluation.report_ladder import ladder_page
from rlhf_jax.storage import Path

REPORT = "report.html"


def write_report(workdir: str | os.PathLike) -> Path:
    """Writes ``workdir/report.html`` over any older one, and returns its path.

    Args:
      workdir: a run (it has ``config.json``) or a ladder (``summary.json``, and one run directory a stage).

    Raises:
      InputError: a file that the report cannot do without is missing or damaged; says which.
    """
    workdir = storage.at(workdir)
    html = run_page(read_run(workdir)) if is_run(workdir) else ladder_page(read_ladder(workdir))
    path = workdir / REPORT
    storage.replace(path, html)
    return path


def run_page(run: Run) -> str:
    """The page of a single run, as HTML: every metric over its steps, and whatever else it left."""
    names = [*run.policies, *(run.samples if isinstance(run.samples, dict) else [])]
    looks = plots_style.looks([run.name if run.name in plots_style.KNOWN else run.stage, *names])
    color = looks[next(iter(looks))].color
    facts = parts.origin({run.name: run})
    curves = [
        parts.curve(run, metric, name=f"metric-{index}", title=metric, color=color)
        for index, metric in enumerate(parts.all_metrics(run))
    ]
    sections = [
        page.section(
            "policies", "What came out", parts.policies_table(run.policies, looks) if run.policies else ""
        ),
        page.section(
            "reward-model", "The reward model", page.figures(parts.reward_model_figures(run, "margins"))
        ),
        page.section(
            "curves",
            "Every metric, step by step",
            page.paragraph(parts.HOW_CURVES_ARE_DRAWN) if any(curves) else "",
            page.figures(curves, "many"),
        ),
        page.section(
            "samples", "What they say", parts.samples_side_by_side(run.samples, run.policies, looks)
        ),
        page.section("numbers", "First and last numbers", parts.final_numbers(run) if run.rows else ""),
        page.section("data", "What was left out of the data", parts.data_report({run.name: run})),
        page.section("configs", "How it was run", parts.configs({run.name: run})),
    ]
    header = (
        f'<header>\n<p class="kicker">Run · {text(run.stage)}</p>\n<h1>{text(run.name)}</h1>\n'
        f'<p class="facts">{text(" · ".join([*facts, *_progress(run)]))}</p>\n</header>'
    )
    files = "the metrics.jsonl, config.json, data.json and handoff.json of this run"
    return page.page(
        f"{run.stage}: {run.name}", "\n".join([header, *filter(None, sections), parts.footer(files)])
    )


def _progress(run: Run) -> Sequence[str]:
    if not run.rows:
        return []
    planned = run.config.get("schedule", {}).get("num_steps")
    done = f"step {run.rows[-1]['step']:,}" + (f" of {planned:,}" if planned else "")
    left = (run.handoff or {}).get("facts", {})
    best = (
        [f"leaves the policy of iteration {left['best_iteration']:,}, the best by what ended the run"]
        if "best_iteration" in left
        else []
    )
    return [done, "finished" if run.handoff else "not finished", *best]
