"""The sections that reports of a ladder and of a single run share. Imports readers, figures and the page's pieces."""

from __future__ import annotations

import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

from rlhf_jax import __version__
from rlhf_jax.evaluation import plots
from rlhf_jax.evaluation import report_html as page
from rlhf_jax.evaluation.plots_style import KNOWN, Look
from rlhf_jax.evaluation.report_files import Run, series
from rlhf_jax.evaluation.report_html import number, text

# As many rows of each kind that was left out as one wants to read; the file has them all.
NUM_LISTED = 5

# A curve's running mean covers a run's length divided by this; shorter runs are drawn as they are.
SMOOTHING = 25
HOW_CURVES_ARE_DRAWN = (
    f"Faint: every value that was written. Bold: their running mean over {1 / SMOOTHING:.0%} of the run. "
    "Rings: held-out rows."
)

# (name in the summary, heading, its unit, digits, what it is)
_COLUMNS = (
    ("proxy", "Proxy", "log-odds", ".2f",
     "the score of the reward model, which training raises; 0 is the average preferred reply"),
    ("gold", "Gold", "points", ".2f",
     "the true reward of the embedded world, which no training ever sees: it is known because the world is made up"),
    ("kl", "KL to SFT", "nats a reply", ".2f",
     "how far the policy has moved from SFT; for best-of-n its bound, log n - (n - 1)/n"),
    ("length", "Length", "tokens", ".1f", "tokens in a reply, its end mark included"),
    ("distinct_2", "Distinct-2", "share", ".2f",
     "share of all word pairs that are different ones: the lower, the more the replies sound alike"),
    ("terminated", "Ended", "share", ".1%", "replies that ended by themselves before the length limit"),
)  # fmt: skip


def policies_table(policies: Mapping[str, Mapping[str, Any]], looks: Mapping[str, Look]) -> str:
    """One row a policy, and under it what each column means; columns that no policy has are left out."""
    columns = [column for column in _COLUMNS if any(column[0] in values for values in policies.values())]
    head = ["Policy"] + [f"{label} <small>{unit}</small>" for _, label, unit, _, _ in columns]
    rows = []
    for name, values in policies.items():
        cells = [number(values.get(key), form) for key, _, _, form, _ in columns]
        rows.append([page.named(plots.policy_label(name, values, looks), looks[name]), *cells])
    meanings = "".join(f"<dt>{label}</dt><dd>{text(what)}.</dd>" for _, label, _, _, what in columns)
    return f"{page.table(head, rows)}\n<dl>{meanings}</dl>"


def samples_side_by_side(
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    policies: Mapping[str, Mapping[str, Any]],
    looks: Mapping[str, Look],
) -> str:
    """For each prompt a row of cards, one a policy: what it said, and what that scored."""
    # A prompt may come twice: the n-th reply of one policy stands beside the n-th of the others.
    rows: dict[tuple[str, int], list[str]] = {}
    for name in sorted(samples, key=list(policies).index if set(samples) <= set(policies) else str):
        replies = samples[name]
        seen: dict[str, int] = {}
        for reply in replies:
            count = seen[reply["prompt"]] = seen.get(reply["prompt"], 0) + 1
            label = plots.policy_label(name, policies.get(name, {}), looks)
            rows.setdefault((reply["prompt"], count), []).append(_card(label, looks[name], reply))
    return "\n".join(
        f'<div class="prompt"><blockquote class="text">{text(prompt.strip())}</blockquote>\n'
        f'<div class="cards">\n{"".join(cards)}</div></div>'
        for (prompt, _), cards in rows.items()
    )


def _card(label: str, look: Look, reply: Mapping[str, Any]) -> str:
    scores = f"proxy <b>{number(reply.get('proxy'))}</b>"
    if reply.get("gold") is not None:
        scores += f" · gold <b>{number(reply['gold'])}</b>"
    length = f"{number(reply.get('length'), 'd')} tokens"
    if reply.get("terminated") is False:
        length += ", cut off"
    said = text(reply["response"].strip()) or "<em>(nothing)</em>"
    return (
        f'<div class="card" {page.hue(look)}><h3>{page.named(label, look)}</h3>'
        f'<small>{scores}<br>{length}</small><p class="text">{said}</p></div>\n'
    )


def reward_model_figures(run: Run, prefix: str) -> list[str]:
    """Margins and calibration on held-out pairs, where the run has left them."""
    color, drawn = KNOWN["reward_model"].color, []
    margins = run.margins.get("margins", ())
    if any(math.isfinite(margin) for margin in margins):
        drawn.append(
            page.figure(
                plots.margins_figure(margins, color),
                name=f"{prefix}-margins",
                title="Reward margins",
                caption=f"Each of the {number(len(margins), ',')} held-out pairs by how much more reward its preferred "
                "reply got. Grey pairs are ranked the wrong way round.",
            )
        )
    if curve := run.margins.get("reliability"):
        error = run.handoff.get("facts", {}).get("calibration_error")
        aside = f" On average it is off by {_points(error)} points." if error is not None else ""
        drawn.append(
            page.figure(
                plots.reliability_figure(curve, color),
                name=f"{prefix}-reliability",
                title="Calibration",
                caption="When the reward model is so sure of a pair, how often is it right? On the dashed line its "
                f"certainty can be taken at its word.{aside}",
            )
        )
    return drawn


def _points(share: float) -> str:
    return f'<data value="{text(repr(share))}">{100 * share:.1f}</data>'


def curve(run: Run, metric: str, *, name: str, title: str, color: str, note: str = "") -> str:
    """One metric of a run over its steps, with its held-out twin ``eval/<metric>`` if there is one; "" without rows."""
    train, held_out = series(run.rows, metric), series(run.rows, f"eval/{metric}")
    if not train and not held_out:
        return ""
    last = [f"last value {number(train[-1][1], '.4g')}"] if train else []
    last += [f"held out {number(held_out[-1][1], '.4g')}"] if held_out else []
    return page.figure(
        plots.curve_figure(train, held_out, color, window=max(1, len(train) // SMOOTHING)),
        name=name,
        title=title,
        caption=f"{note}{', '.join(last).capitalize()}.",
    )


def data_report(runs: Mapping[str, Run]) -> str:
    """How many rows each run used, and which it left out or cut, with the reasons of the first few."""
    rows, lists, repeated = [], [], 0
    for name, run in runs.items():
        unreadable = run.data.get("unreadable", [])
        parts = {part: found for part, found in run.data.items() if part != "unreadable"}
        for part, found in parts.items():
            listed = [found[kind] for kind in ("dropped", "truncated")]
            counts = [found["kept"], found.get("repeated", 0), *map(len, listed), len(unreadable)]
            repeated += counts[1]
            rows.append(
                [text(f"{name}, {part.replace('_', ' ')}"), *(number(count, ",") for count in counts)]
            )
            lists += [
                _listed(f"{name}, {part.replace('_', ' ')}: {kind}", found[kind])
                for kind in ("dropped", "truncated")
            ]
        lists.append(_listed(f"{name}: unreadable", unreadable))
    if not rows:
        return ""
    lists = [found for found in lists if found]
    said = (
        "Rows that were left out or cut, with the reason for the first few of each kind."
        if lists
        else "Nothing was left out and nothing was cut."
    )
    if repeated:
        said += (
            " Where prompts are used once each, rows that repeat an earlier one's are counted as repeated."
        )
    head = ["Rows of", "Kept", "Repeated", "Dropped", "Truncated", "Unreadable"]
    return page.paragraph(said) + "\n" + page.table(head, rows, "small") + "\n".join(lists)


def _listed(title: str, found: Sequence[Sequence[str]]) -> str:
    if not found:
        return ""
    items = "".join(f"<li><b>{text(source)}</b> {text(reason)}</li>" for source, reason in found[:NUM_LISTED])
    left = len(found) - NUM_LISTED
    more = f"<li>and {left:,} more in data.json</li>" if left > 0 else ""
    return page.folded(title, f"{len(found):,}", f"<ul>{items}{more}</ul>")


def configs(runs: Mapping[str, Run]) -> str:
    """Every config.json, folded away, with the code that ran it."""
    return "\n".join(
        page.folded(name, _code(run), page.as_json({"config": run.config, "inputs": run.inputs}))
        for name, run in runs.items()
    )


def _code(run: Run) -> str:
    version = run.handoff.get("code_version")
    return f"rlhf_jax {version}" if version else ""


def footer(sources: str) -> str:
    """``sources``: plain text, what the page was made from."""
    return (
        f"<footer>Every number on this page is read from {text(sources)}. Page drawn by rlhf_jax {text(__version__)} "
        f"with Matplotlib {text(matplotlib.__version__)}.</footer>"
    )


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"


def origin(runs: Mapping[str, Run]) -> list[str]:
    """What was trained on what, in a few words each, as far as configs and hand-offs tell."""
    found = []
    settings = [run.config for run in runs.values()]
    data = next((config["data"] for config in settings if "data" in config), {})
    # Names, not paths: a page is sent to others, whose machines have other directories.
    if data.get("path"):
        found.append(f"data {pathlib.PurePath(data['path']).name}")
    elif data.get("embedded") == "arithmetic":
        sums = data.get("arithmetic", {})
        found.append(
            f"embedded arithmetic of {sums.get('num_digits')} digits, seed {sums.get('seed')}, "
            f"slip rate {sums.get('slip_rate')}"
        )
    elif "world" in data:
        world = data["world"]
        found.append(
            f"embedded film-review world, seed {world.get('seed')}, length bias {world.get('length_bias')}"
        )
    source = next((config["model"]["path"] for config in settings if config.get("model", {}).get("path")), "")
    shape = next((run.handoff["model"] for run in runs.values() if "model" in run.handoff), {})
    if source:
        found.append(f"started from {pathlib.PurePath(source).name}")
    if shape:
        found.append(
            f"{shape.get('num_layers')} layers of width {shape.get('width')}, vocabulary {shape.get('vocab_size'):,}"
        )
    seeds = sorted({config["seed"] for config in settings if "seed" in config})
    if seeds:
        found.append("training seed " + ", ".join(map(str, seeds)))
    return found


def all_metrics(run: Run) -> list[str]:
    """Names of a run's metrics in the order they appear, ``eval/x`` under ``x``."""
    names = itertools.chain.from_iterable(run.rows)
    plain = dict.fromkeys(name.removeprefix("eval/") for name in names if name != "step")
    return [name for name in plain if series(run.rows, name) or series(run.rows, f"eval/{name}")]


def final_numbers(run: Run) -> str:
    """First and last value of every metric, and the steps they are of."""
    rows = []
    for metric in dict.fromkeys(itertools.chain.from_iterable(run.rows)):
        found = [(row["step"], row[metric]) for row in run.rows if metric in row]
        if metric == "step":
            continue
        first, last = found[0], found[-1]
        cells = [f"{number(value, '.4g')} <small>step {step:,}</small>" for step, value in (first, last)]
        broken = sum(not math.isfinite(value) for _, value in found)
        rows.append([text(metric), *cells, number(broken, "d")])
    return page.table(["Metric", "First", "Last", "Not finite"], rows, "small")
