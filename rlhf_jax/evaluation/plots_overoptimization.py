"""Rewards against sqrt(KL): proxy and gold with the fitted curve and its peak, or one reward where there is no gold.

Imports the other plots, overoptimization and errors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_jax.errors import InputError
from rlhf_jax.evaluation import plots
from rlhf_jax.evaluation import plots_style as style
from rlhf_jax.evaluation.overoptimization import Fit
from rlhf_jax.evaluation.plots_style import INK, PAPER, Look

CURVE_POINTS = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Course:
    """What is drawn of one way to optimise against one proxy.

    distance, gold: [M] sqrt(KL) and gold gained. proxy: [M] proxy gained, or None. curve: gold at distances, with the
    coefficients of ``fit`` put in, e.g. ``lambda d: rl_gold(d, fit.alpha, fit.beta)``; None, as ``fit``, where the data
    could not be fitted.
    """

    distance: Sequence[float]
    gold: Sequence[float]
    proxy: Sequence[float] | None = None
    curve: Callable[[np.ndarray], np.ndarray] | None = None
    fit: Fit | None = None


def overoptimization_figure(courses: Mapping[str, Course], looks: Mapping[str, Look]) -> Figure:
    """Gold as marks with its fitted curve, the proxy dashed in the same colour; the peak ringed, with a bar for its
    95% interval.

    Args:
      courses: name -> course; at least one, each with at least one measurement.
      looks: name -> look, of ``plots_style.looks``.

    Raises:
      InputError: nothing to draw, or series of different lengths.
    """
    if not courses:
        raise InputError("no courses were given to draw: give at least one")
    figure, axes = style.new_figure(560, 360 + 22 * len(courses))
    for name, course in courses.items():
        lengths = {
            len(values) for values in (course.distance, course.gold, course.proxy) if values is not None
        }
        if len(lengths) != 1 or 0 in lengths:
            raise InputError(
                f"{name} has series of lengths {sorted(lengths)}: give one gold and proxy a distance"
            )
        _course(axes, course, looks[name])
    axes.margins(x=0.06, y=0.14)
    axes.set_xlim(left=0)
    plots._kl_axis(axes)
    axes.set_ylabel("reward gained")
    for name, course in courses.items():
        _peak(axes, course, looks[name])
    # Below the axes: whatever the curves do, nothing is hidden.
    figure.legend(loc="outside lower left", fontsize=12, labelcolor=INK, frameon=False)
    return figure


def reward_figure(
    courses: Mapping[str, tuple[Sequence[float], Sequence[float]]], looks: Mapping[str, Look], *, label: str
) -> Figure:
    """One reward against sqrt(KL) where there is no gold: name -> (distance, reward) in the order of training.

    Raises:
      InputError: nothing to draw, or series of different lengths.
    """
    if not courses:
        raise InputError("no courses were given to draw: give at least one")
    figure, axes = style.new_figure(560, 360 + 22 * len(courses))
    for name, (distance, reward) in courses.items():
        if len(distance) != len(reward) or not len(distance):
            raise InputError(
                f"{name} has {len(distance)} distances and {len(reward)} rewards: give one of each, at least one"
            )
        look = looks[name]
        axes.plot(distance, reward, color=look.color, marker=look.marker, markersize=8, linewidth=1.8,
                  markeredgecolor=PAPER, label=look.label)  # fmt: skip
    axes.margins(x=0.06, y=0.14)
    axes.set_xlim(left=0)
    plots._kl_axis(axes)
    axes.set_ylabel(label)
    figure.legend(loc="outside lower left", fontsize=12, labelcolor=INK, frameon=False)
    return figure


def _course(axes: Axes, course: Course, look: Look) -> None:
    order = np.argsort(course.distance, kind="stable")
    distance, gold = (np.asarray(values, np.float64)[order] for values in (course.distance, course.gold))
    axes.plot(distance, gold, linestyle="none", color=look.color, marker=look.marker, markersize=8,
              markeredgecolor=PAPER, label=_gold_label(course, look))  # fmt: skip
    if course.curve is not None:
        at = np.linspace(0.0, distance[-1], CURVE_POINTS)
        axes.plot(at, course.curve(at), color=look.color, linewidth=2.2)
    if course.proxy is not None:
        axes.plot(distance, np.asarray(course.proxy, np.float64)[order], color=look.color, linewidth=1.6,
                  linestyle=(0, (4, 3)))  # fmt: skip


def _peak(axes: Axes, course: Course, look: Look) -> None:
    """Rings the fitted peak where it was seen; one that is an extrapolation is not drawn."""
    fit = course.fit
    if fit is None or not fit.peak_seen:
        return
    left, right = axes.get_xlim()
    interval = fit.peak_distance_interval
    ends = [min(max(end, left), right) for end in (interval.low, interval.high)]
    axes.plot(ends, [fit.peak_gold] * 2, color=look.color, linewidth=5, alpha=0.25, solid_capstyle="butt")
    axes.plot([fit.peak_distance], [fit.peak_gold], marker="o", markersize=15, color="none",
              markeredgecolor=look.color, markeredgewidth=1.6)  # fmt: skip


def _gold_label(course: Course, look: Look) -> str:
    if course.fit is None or not course.fit.peak_seen:
        return f"{look.label}: gold"
    return f"{look.label}: gold, peak {course.fit.peak_gold:.2f} at KL {_round(course.fit.peak_distance**2)}"


def _round(value: float) -> str:
    """Two significant digits, without an exponent."""
    digits = max(0, 1 - math.floor(math.log10(value)))
    return f"{value:.{digits}f}"
