"""What the over-optimisation lab leaves: fits as JSON, figures, one page. Imports fits, their plot and report_html."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.evaluation import overoptimization as fits
from rlhf_jax.evaluation import plots_overoptimization as drawing
from rlhf_jax.evaluation import plots_style as style
from rlhf_jax.evaluation import report_html as html

PAGE, SUMMARY = "overoptimization.html", "overoptimization.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One way to optimise one proxy, M measurements.

    distance: [M] sqrt(KL). proxy, gold: [M] gained over the initial policy. clusters: [M] int, which of them share
    their noise; None for those of one run. fits: the curve's form.
    """

    distance: np.ndarray
    proxy: np.ndarray
    gold: np.ndarray
    clusters: np.ndarray | None
    fits: Literal["best_of_n", "rl"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Courses that are drawn together, under a title. key: names its picture and its part of the JSON. kls: where gold
    is given as a number, nats."""

    key: str
    title: str
    courses: Mapping[str, Measured]
    kls: tuple[float, ...]


def fit(measured: Measured, *, seed: int) -> fits.Fit | None:
    """The curve fitted to gold; None where the data cannot tell its coefficients."""
    function = {"best_of_n": fits.fit_best_of_n, "rl": fits.fit_rl}[measured.fits]
    try:
        return function(measured.distance, measured.gold, seed=seed, clusters=measured.clusters)
    except InputError:
        return None


def gold_at(measured: Measured, kl: float) -> float | None:
    """Gold gained at a KL, between the two measurements around it (from 0 at 0); None beyond the last."""
    distances, inverse = np.unique(measured.distance, return_inverse=True)
    means = np.bincount(inverse, weights=measured.gold) / np.bincount(inverse)
    if math.sqrt(kl) > distances[-1]:
        return None
    return float(np.interp(math.sqrt(kl), [0.0, *distances], [0.0, *means]))


def summarize(measured: Measured, fitted: fits.Fit | None, kls: tuple[float, ...]) -> dict[str, Any]:
    """Numbers of one course: its fit, the greatest gold measured and where, and gold at some KLs."""
    distances, inverse = np.unique(measured.distance, return_inverse=True)
    means = np.bincount(inverse, weights=measured.gold) / np.bincount(inverse)
    best = int(np.argmax(means))
    return {
        "fit": None if fitted is None else dataclasses.asdict(fitted),
        "greatest_gold": float(means[best]),
        "greatest_gold_kl": float(distances[best] ** 2),
        "last_gold": float(means[-1]),
        "last_kl": float(distances[-1] ** 2),
        "gold_at_kl": {f"{kl:g}": gold_at(measured, kl) for kl in kls},
        "measurements": {
            "kl": (measured.distance**2).tolist(),
            "proxy": measured.proxy.tolist(),
            "gold": measured.gold.tolist(),
        },
    }


def write(
    workdir: pathlib.Path,
    *,
    sections: Sequence[Section],
    kl_of_best_of_n: Sequence[Mapping[str, float]],
    seed: int,
) -> dict[str, Any]:
    """Fits, draws and writes everything into ``workdir``; returns what the JSON holds.

    Args:
      workdir: a directory that is there.
      sections: what is drawn; their keys differ.
      kl_of_best_of_n: rows of n, bound, measured and its standard error, nats.
      seed: of the bootstrap.
    """
    forms = {"best_of_n": fits.best_of_n_gold, "rl": fits.rl_gold}
    summary: dict[str, Any] = {"peaks": {}, "courses": {}, "kl_of_best_of_n": list(kl_of_best_of_n)}
    parts = []
    for section in sections:
        fitted = {name: fit(measured, seed=seed) for name, measured in section.courses.items()}
        found = {
            name: summarize(measured, fitted[name], section.kls) for name, measured in section.courses.items()
        }
        summary["courses"][section.key] = found
        summary["peaks"][section.key] = {name: _peak(values) for name, values in found.items()}
        drawn = {
            name: _course(measured, fitted[name], forms[measured.fits])
            for name, measured in section.courses.items()
        }
        figure = drawing.overoptimization_figure(drawn, style.looks(drawn))
        with style.settings():
            path = workdir / f"overoptimization_{section.key}.png"
            figure.savefig(path, dpi=144, facecolor="white", metadata={"Software": None})
        caption = "Marks: gold measured; line: fitted curve, its peak ringed; dashed: the proxy."
        picture = html.figure(
            figure, name=section.key.replace("_", "-"), title=section.title, caption=caption
        )
        parts.append(html.section(section.key, section.title, picture, _table(found, section.kls)))
    title = "KL of best-of-n, measured and log n - (n-1)/n"
    parts.append(html.section("kl", title, _kl_table(kl_of_best_of_n)))
    (workdir / SUMMARY).write_text(json.dumps(_finite(summary), indent=1))
    header = "<header><h1>Over-optimisation: gold against distance</h1></header>"
    (workdir / PAGE).write_text(html.page("Over-optimisation", "\n".join([header, *parts])), encoding="utf-8")
    return summary


def _kl_table(rows: Sequence[Mapping[str, float]]) -> str:
    cells = [
        [html.text(f"{row['n']:g}"), *(html.number(row[name]) for name in ("bound", "measured", "error"))]
        for row in rows
    ]
    return html.table([html.text(cell) for cell in ("n", "bound", "measured", "standard error")], cells)


def _course(measured: Measured, fitted: fits.Fit | None, form: Any) -> drawing.Course:
    """Measurements at one distance as their mean: one mark a distance."""
    distances, inverse = np.unique(measured.distance, return_inverse=True)
    counts = np.bincount(inverse)
    curve = None if fitted is None else lambda d: form(d, fitted.alpha, fitted.beta)
    return drawing.Course(
        distance=distances,
        gold=np.bincount(inverse, weights=measured.gold) / counts,
        proxy=np.bincount(inverse, weights=measured.proxy) / counts,
        curve=curve,
        fit=fitted,
    )


def _peak(found: Mapping[str, Any]) -> dict[str, Any]:
    peak = {
        name: round(found[name], 3) for name in ("greatest_gold", "greatest_gold_kl", "last_gold", "last_kl")
    }
    if found["fit"] is not None and found["fit"]["peak_seen"]:
        interval = found["fit"]["peak_distance_interval"]
        peak["fitted_peak_gold"] = round(found["fit"]["peak_gold"], 3)
        peak["fitted_peak_kl"] = round(found["fit"]["peak_distance"] ** 2, 3)
        peak["fitted_peak_kl_interval"] = [round(interval[end] ** 2, 3) for end in ("low", "high")]
    return peak


def _table(found: Mapping[str, Any], kls: tuple[float, ...]) -> str:
    head = ["proxy", "alpha", "beta", "peak at KL", "peak gold", *(f"gold at KL {kl:g}" for kl in kls)]
    rows = []
    for name, values in found.items():
        fitted = values["fit"] or {}
        seen = fitted.get("peak_seen", False)
        peak = [fitted["peak_distance"] ** 2, fitted["peak_gold"]] if seen else [None, None]
        numbers = [fitted.get("alpha"), fitted.get("beta"), *peak, *values["gold_at_kl"].values()]
        rows.append([html.text(name), *map(html.number, numbers)])
    return html.table([html.text(cell) for cell in head], rows)


def _finite(value: Any) -> Any:
    """JSON has no infinity: null stands for a peak that is nowhere."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
