"""The figures of a report: functions from numbers to Matplotlib figures. Imports plots_style and the report's readers.

Every figure draws the numbers that were written, at most thinned for drawing; the one thing computed is a running mean,
which captions name.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rlhf_jax.evaluation import plots_style as style
from rlhf_jax.evaluation.plots_style import INK, MUTED, PAPER, Look
from rlhf_jax.evaluation.report_files import Ladder, Point, is_number, read_ladder, trace
from rlhf_jax.evaluation.report_findings import gold_course

# More points than pixels only make the file larger.
MAX_DRAWN = 1000

Series = Sequence[tuple[int, float]]


def distance_figure(
    traces: Mapping[str, Sequence[Point]],
    policies: Mapping[str, Mapping[str, Any]],
    looks: Mapping[str, Look],
    quantity: str,
) -> Figure:
    """Proxy or gold against sqrt(KL to SFT): a line for each trained policy's course, a point for every other policy.

    Args:
      traces: name -> evaluations in step order.
      policies: name -> {"kl", quantity}; those with a trace are left to their line.
      looks: name -> look.
      quantity: "proxy" or "gold"; the peak of gold is ringed.
    """
    figure, axes = style.new_figure(470, 350)
    for name, points in traces.items():
        _trace(axes, points, looks[name], quantity)
    for name, values in policies.items():
        if name not in traces and is_number(values.get(quantity)) and is_number(values.get("kl")):
            _point(axes, values["kl"], values[quantity], looks[name])
    _kl_axis(axes)
    axes.margins(x=0.06, y=0.14)
    if quantity == "gold":
        for name, points in traces.items():
            _mark_peak(axes, points, looks[name])
    return figure


def steps_figure(
    lines: Mapping[str, Series],
    dots: Mapping[str, Series],
    looks: Mapping[str, Look],
    *,
    from_zero: bool = False,
) -> Figure:
    """One quantity over steps: a faint line for what training saw, joined dots for held-out evaluations."""
    figure, axes = style.new_figure(470, 280)
    for name, series in lines.items():
        _line(axes, series, looks[name].color, width=1.1, alpha=0.45)
    for name, series in dots.items():
        look = looks[name]
        width, marker = (2.2, look.marker) if len(series) < 40 else (2.2, "")
        _line(axes, series, look.color, width=width, marker=marker)
    _step_axis(axes)
    if from_zero:
        axes.set_ylim(bottom=0)
    return figure


def curve_figure(train: Series, held_out: Series, color: str, *, window: int) -> Figure:
    """A metric over steps: written values faint, their running mean over ``window`` bold, evaluations as rings."""
    figure, axes = style.new_figure(350, 220)
    _line(axes, train, color, width=1.0, alpha=0.4 if window > 1 else 1.0)
    if window > 1:
        _line(axes, running_mean(train, window), color, width=2.2)
    if held_out:
        steps, values = zip(*_thinned(held_out), strict=True)
        joined, ink = "-" if len(held_out) > 2 else "none", INK if train else color
        axes.plot(
            steps, values, linestyle=joined, linewidth=1.2, color=ink, marker="o", markersize=5.5,
            markerfacecolor=PAPER, markeredgecolor=ink, markeredgewidth=1.5, clip_on=False, zorder=4,
        )  # fmt: skip
    _step_axis(axes)
    return figure


def running_mean(series: Series, window: int) -> list[tuple[int, float]]:
    """(step, mean of the about ``window`` values around it); fewer of them near the ends."""
    values = np.array([value for _, value in series], np.float64)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    starts = np.maximum(places - window // 2, 0)
    ends = np.minimum(places + window // 2 + 1, len(values))
    means = (sums[ends] - sums[starts]) / (ends - starts)
    return [(step, float(mean)) for (step, _), mean in zip(series, means, strict=True)]


def margins_figure(margins: Sequence[float], color: str) -> Figure:
    """How many held-out pairs have which reward margin; those ranked the wrong way round are grey."""
    figure, axes = style.new_figure(470, 300)
    values = np.asarray(margins, np.float64)
    values = values[np.isfinite(values)]
    # Bins that share an edge at 0, so that none mixes right and wrong; a tie is no better than wrong.
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    width = max(high - low, 1e-6) / 40
    edges = width * np.arange(math.floor(low / width) - 1, math.ceil(high / width) + 2)
    wrong = values[values <= 0]
    axes.hist(np.where(wrong == 0, -width / 2, wrong), bins=edges, color=MUTED, alpha=0.55)
    axes.hist(values[values > 0], bins=edges, color=color)
    axes.axvline(0, color=INK, linewidth=1.2)
    axes.margins(y=0.16)
    _say(axes, 0.02, 0.97, "wrong way round", MUTED, ha="left")
    _say(axes, 0.98, 0.97, "right way round", INK, ha="right")
    axes.set_xlabel("reward of the preferred reply - reward of the other")
    axes.set_ylabel("pairs")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


def reliability_figure(curve: Sequence[Mapping[str, float]], color: str) -> Figure:
    """How sure the reward model is against how often it is right, each bin a dot; the diagonal is honest."""
    figure, axes = style.new_figure(470, 300)
    confidence = [point["confidence"] for point in curve]
    accuracy = [point["accuracy"] for point in curve]
    low = min(0.5, *accuracy) - 0.02
    axes.plot([0.5, 1.0], [0.5, 1.0], color=MUTED, linewidth=1.2, dashes=(4, 3))
    axes.plot(confidence, accuracy, color=color, linewidth=2.2, marker="o", markersize=7,
              markeredgecolor=PAPER, clip_on=False)  # fmt: skip
    axes.set_xlim(0.49, 1.01)
    axes.set_ylim(low, 1.02)
    _say(axes, 0.03, 0.96, "modest: right more often than it claims", MUTED, ha="left")
    _say(axes, 0.98, 0.04, "boastful: right less often", MUTED, ha="right", va="bottom")
    axes.set_xlabel("how sure it is")
    axes.set_ylabel("how often it is right")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))
    return figure


def accuracy_figure(marks: Sequence[tuple[str, float, str]]) -> Figure:
    """Accuracies (label, value in [0, 1], colour) as bars from the 50% of a coin."""
    figure, axes = style.new_figure(470, 40 + 50 * len(marks))
    low = min(0.5, *(value for _, value, _ in marks))
    top = max(0.75, *(value for _, value, _ in marks))
    for row, (label, value, color) in enumerate(marks):
        axes.barh(row, value - low, left=low, height=0.34, color=color)
        axes.annotate(
            label, (low, row - 0.28), xytext=(2, 0), textcoords="offset points", color=MUTED, fontsize=13
        )
        axes.annotate(f"{value:.1%}", (value, row), xytext=(8, 0), textcoords="offset points", color=INK, fontsize=14,
                      va="center", fontweight="bold")  # fmt: skip
    axes.set_xlim(low, top + 0.14 * (top - low))
    axes.set_ylim(len(marks) - 0.5, -0.75)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    axes.axvline(low, color=MUTED, linewidth=1.2)
    return figure


def save_overview(workdir: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
    """Draws a finished ladder as one wide PNG: reward against distance from SFT, and what each policy is worth.

    Args:
      workdir: the ladder's directory.
      path: where the picture goes; its directory must exist.

    Raises:
      InputError: the ladder cannot be read.
    """
    ladder = read_ladder(workdir)
    traces = {name: points for name, run in ladder.runs.items() if len(points := trace(run.rows)) > 1}
    looks = style.looks([*ladder.policies, *ladder.runs])
    gold = all(is_number(values.get("gold")) for values in ladder.policies.values()) and all(
        point.gold is not None for points in traces.values() for point in points
    )
    with style.settings():
        figure = Figure(figsize=(12, 4.9), dpi=160, layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2, width_ratios=(1.75, 1))
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12, wspace=0.04)
        _overview_course(left, traces, ladder, looks, gold)
        _overview_bars(right, ladder, looks, "gold" if gold else "proxy")
        figure.savefig(path, format="png", metadata={"Software": None})
    return path


def _overview_course(axes: Axes, traces, ladder: Ladder, looks: Mapping[str, Look], gold: bool) -> None:
    style.calm(axes, font=14)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    marked = {"linewidth": 3, "markersize": 7, "markeredgecolor": "white"}
    for name, points in traces.items():
        look = looks[name]
        x = _roots([point.kl for point in points])
        proxy = {"linewidth": 2.2, "dashes": (3.5, 2)} if gold else marked | {"marker": look.marker}
        axes.plot(x, [point.proxy for point in points], color=look.color, **proxy)
        if gold:
            axes.plot(x, [point.gold for point in points], color=look.color, **marked, marker=look.marker)
    # One kind of line needs no key.
    kinds = (
        [("proxy: what it was trained on", (3.5, 2)), ("gold: what was wanted", (None, None))] if gold else []
    )
    handles = [axes.plot([], [], color=looks[name].color, linewidth=3)[0] for name in traces]
    handles += [axes.plot([], [], color=INK, linewidth=2.2, dashes=dashes)[0] for _, dashes in kinds]
    labels = [f"{looks[name].label} (beta {_beta(ladder, name)})" for name in traces]
    labels += [label for label, _ in kinds]
    _kl_axis(axes)
    axes.margins(x=0.03, y=0.06)
    axes.xaxis.label.set_size(14)
    axes.set_title(
        f"{'Reward' if gold else 'Proxy'} against distance from SFT",
        loc="left",
        color=INK,
        fontsize=17,
        pad=14,
    )
    # Below the axes: curves can be anywhere inside.
    axes.legend(
        handles,
        labels,
        fontsize=13,
        labelcolor=INK,
        loc="upper left",
        bbox_to_anchor=(0, -0.16),
        ncols=2,
        frameon=False,
    )


def _overview_bars(axes: Axes, ladder: Ladder, looks: Mapping[str, Look], quantity: str) -> None:
    style.calm(axes, font=14)
    shown = {
        name: values[quantity] for name, values in ladder.policies.items() if is_number(values.get(quantity))
    }
    axes.barh(
        range(len(shown)), list(shown.values()), color=[looks[name].color for name in shown], height=0.62
    )
    low, high = min([0.0, *shown.values()]), max([1e-9, *shown.values()])
    pad = 0.025 * (high - low)
    for row, value in enumerate(shown.values()):
        axes.text(value + (pad if value >= 0 else -pad), row, f"{value:.2f}", va="center", fontsize=14, color=INK,
                  ha="left" if value >= 0 else "right")  # fmt: skip
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.set_xlim(low - 0.26 * (high - low) * (low < 0), high + 0.18 * (high - low))
    axes.set_yticks(range(len(shown)), [policy_label(name, ladder.policies[name], looks) for name in shown])
    axes.tick_params(axis="y", labelcolor=INK, labelsize=14)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    titles = {"gold": "Gold of each policy", "proxy": "Proxy of each policy"}
    axes.set_title(titles[quantity], loc="left", color=INK, fontsize=17, pad=14)


def policy_label(name: str, values: Mapping[str, Any], looks: Mapping[str, Look]) -> str:
    """A policy's name for people; best-of-n says its n."""
    return f"Best of {values['n']}" if name == "best_of_n" and "n" in values else looks[name].label


def _beta(ladder: Ladder, name: str) -> str:
    beta = ladder.runs[name].config.get("beta")
    return "?" if beta is None else f"{beta:g}"


def _trace(axes: Axes, points: Sequence[Point], look: Look, quantity: str) -> None:
    shown = [(point.kl, getattr(point, quantity)) for point in points if getattr(point, quantity) is not None]
    if not shown:
        return
    x, y = zip(*_thinned(shown), strict=True)
    axes.plot(_roots(x), y, color=look.color, linewidth=2.4, marker=look.marker, markersize=8,
              markeredgecolor=PAPER, markeredgewidth=1.0)  # fmt: skip


def _point(axes: Axes, kl: float, value: float, look: Look) -> None:
    axes.plot(_roots([kl]), [value], linestyle="none", color=look.color, marker=look.marker, markersize=11,
              markeredgecolor=PAPER, markeredgewidth=1.2, zorder=5)  # fmt: skip


def _mark_peak(axes: Axes, points: Sequence[Point], look: Look) -> None:
    course = gold_course(points)
    if course is None or course.lost is None:
        return
    x, y = math.sqrt(max(course.peak.kl, 0.0)), course.peak.gold
    axes.plot(
        [x], [y], marker="o", markersize=17, color="none", markeredgecolor=look.color, markeredgewidth=1.6
    )
    left, right = axes.get_xlim()
    late = x > left + 0.6 * (right - left)
    axes.annotate(f"peak {y:.2f}", (x, y), xytext=(-8 if late else 8, 12), textcoords="offset points", fontsize=13,
                  color=INK, ha="right" if late else "left", va="bottom")  # fmt: skip


def _roots(values: Sequence[float]) -> np.ndarray:
    # Rounding can leave a KL of nothing a hair below 0.
    return np.sqrt(np.maximum(np.asarray(values, np.float64), 0.0))


def _kl_axis(axes: Axes) -> None:
    """Ticks at round KL, spaced by their square roots: near SFT reward grows about linearly with sqrt(KL)."""
    top = max(axes.get_xlim()[1], 1e-4) ** 2
    powers = range(math.floor(math.log10(top)) - 2, math.floor(math.log10(top)) + 1)
    ticks = [math.inf]
    for tick in sorted((digit * 10.0**power for digit in (1, 2, 3, 5, 7) for power in powers), reverse=True):
        room = math.sqrt(min(ticks[-1], 2 * top)) - math.sqrt(tick)
        if tick <= top and min(room, math.sqrt(tick)) > 0.12 * math.sqrt(top):
            ticks.append(tick)
    ticks = [0.0, *reversed(ticks[1:])]
    axes.set_xticks([math.sqrt(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("KL to SFT, nats (square-root scale)")


def _step_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.set_xlabel("step")
    axes.margins(x=0.03)
    low, high = axes.get_ylim()
    drawn = [float(y) for line in axes.lines for y in line.get_ydata()]
    if drawn and max(drawn) - min(drawn) <= 1e-6 * max(map(abs, drawn)):
        # A constant: Matplotlib would magnify its rounding.
        pad = max(0.2 * abs(drawn[0]), 1e-3)
        low, high = drawn[0] - pad, drawn[0] + pad
    axes.set_ylim(low, high)


def _line(
    axes: Axes, series: Series, color: str, *, width: float, alpha: float = 1.0, marker: str = ""
) -> None:
    if not series:
        return
    steps, values = zip(*_thinned(series), strict=True)
    # A lone value would be a line of no length.
    marker = marker or ("o" if len(steps) == 1 else "")
    axes.plot(steps, values, color=color, linewidth=width, alpha=alpha, marker=marker, markersize=7,
              markeredgecolor=PAPER, solid_joinstyle="round")  # fmt: skip


def _thinned(series: Sequence) -> Sequence:
    stride = -(-len(series) // MAX_DRAWN)
    return series if stride <= 1 else [*series[::stride], series[-1]]


def _say(axes: Axes, x: float, y: float, text: str, color: str, *, ha: str, va: str = "top") -> None:
    axes.text(x, y, text, transform=axes.transAxes, color=color, fontsize=13, ha=ha, va=va)
