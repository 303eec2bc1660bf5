"""The figures of a data report: lengths, and how often the longer response wins. Imports plots_style and statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from rlhf_jax.evaluation import plots_style as style
from rlhf_jax.evaluation.plots_style import INK, KNOWN, MUTED
from rlhf_jax.evaluation.preference_statistics import LengthBin, Lengths

CHOSEN, REJECTED = KNOWN["reward_model"].color, MUTED


def lengths_figure(found: Lengths) -> Figure:
    """How many chosen and how many rejected responses have which length; lengths on a logarithmic axis."""
    figure, axes = style.new_figure(470, 300)
    both = np.concatenate([found.chosen, found.rejected])
    low, high = math.log2(max(both.min(), 1)), math.log2(max(both.max(), 2))
    bins = 2.0 ** np.linspace(low, max(high, low + 1e-6), 32)
    axes.hist(np.maximum(found.rejected, 1), bins=bins, color=REJECTED, alpha=0.45)
    axes.hist(np.maximum(found.chosen, 1), bins=bins, color=CHOSEN, histtype="step", linewidth=2.0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.set_xlabel("characters")
    axes.set_ylabel("responses")
    return figure


def length_bias_figure(bins: Sequence[LengthBin]) -> Figure:
    """The share of pairs in which the longer response wins, by how much longer it is; the dashed line is no bias."""
    figure, axes = style.new_figure(470, 300)
    places = range(len(bins))
    axes.bar(places, [found.longer_wins for found in bins], color=CHOSEN, width=0.6)
    for place, found in zip(places, bins, strict=True):
        axes.annotate(
            f"{found.longer_wins:.0%}",
            (place, found.longer_wins),
            xytext=(0, 5),
            textcoords="offset points",
            color=INK,
            fontsize=13,
            ha="center",
        )
    axes.axhline(0.5, color=INK, linewidth=1.2, dashes=(4, 3))
    axes.set_ylim(0, 1.08)
    axes.set_xticks(list(places), [bin_label(found) for found in bins])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))
    axes.set_xlabel("the longer response is so many times as long")
    return figure


def bin_label(found: LengthBin) -> str:
    """A bin of length ratios in words."""
    return f"over {found.low:g}" if math.isinf(found.high) else f"{found.low:g} to {found.high:g}"
