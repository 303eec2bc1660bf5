"""What the lab leaves: fitted peaks where the data have them, gold at a KL by hand, and files that open."""

import functools
import json

import numpy as np
import pytest

from rlhf_jax.evaluation import overoptimization_page as page
from rlhf_jax.evaluation.overoptimization_page import Measured, Section


def measured(alpha, beta, *, rl=False, sets=4):
    rng = np.random.default_rng(0)
    distance = np.tile(np.linspace(0.5, 3.0, 8), sets)
    form = alpha * distance - beta * distance * (np.log(distance) if rl else distance)
    return Measured(
        distance=distance,
        proxy=distance * alpha,
        gold=form + 0.01 * rng.standard_normal(distance.size),
        clusters=np.repeat(np.arange(sets), 8),
        fits="rl" if rl else "best_of_n",
    )


def test_gold_at_a_kl_by_hand():
    data = Measured(
        distance=np.array([1.0, 2.0, 1.0, 2.0]),
        proxy=np.zeros(4),
        gold=np.array([1.0, 4.0, 3.0, 0.0]),
        clusters=np.array([0, 0, 1, 1]),
        fits="best_of_n",
    )
    # Means are 2 at distance 1 and 2 at distance 2; 0 at 0.
    assert [page.gold_at(data, kl) for kl in (0.25, 1.0, 2.25, 4.0, 4.1)] == [1.0, 2.0, 2.0, 2.0, None]
    found = page.summarize(data, None, (1.0,))
    assert (found["greatest_gold"], found["greatest_gold_kl"], found["last_kl"]) == (2.0, 1.0, 4.0)


def test_files_hold_the_peaks_that_the_data_have(tmp_path):
    turning, rising = measured(2.0, 0.5), measured(1.0, 0.01)
    few = Measured(distance=np.ones(2), proxy=np.ones(2), gold=np.ones(2), clusters=None, fits="rl")
    section = functools.partial(Section, title="A title", kls=(1.0,))
    page.write(
        tmp_path,
        sections=[
            section(key="best_of_n", courses={"turns": turning, "<rises>": rising}),
            section(key="rl", courses={"rl": measured(1.0, 0.6, rl=True), "few": few}),
        ],
        kl_of_best_of_n=[{"n": 2, "bound": 0.193, "measured": 0.19, "error": 0.004}],
        seed=0,
    )
    summary = json.loads((tmp_path / page.SUMMARY).read_text())
    peak = summary["peaks"]["best_of_n"]["turns"]
    assert peak["fitted_peak_kl"] == pytest.approx(4.0, rel=0.05) and peak[
        "fitted_peak_gold"
    ] == pytest.approx(2.0, rel=0.02)
    assert peak["fitted_peak_kl_interval"][0] <= peak["fitted_peak_kl"] <= peak["fitted_peak_kl_interval"][1]
    assert "fitted_peak_kl" not in summary["peaks"]["best_of_n"]["<rises>"], "beyond what was measured"
    assert summary["courses"]["rl"]["few"]["fit"] is None
    assert summary["peaks"]["rl"]["rl"]["fitted_peak_kl"] == pytest.approx(
        np.exp(2 * (1 / 0.6 - 1)), rel=0.05
    )
    assert summary["kl_of_best_of_n"][0]["measured"] == 0.19
    text = (tmp_path / page.PAGE).read_text()
    assert "&lt;rises&gt;" in text and "<rises>" not in text and text.count("<svg") == 2
    for kind in ("best_of_n", "rl"):
        assert (tmp_path / f"overoptimization_{kind}.png").read_bytes()[:4] == b"\x89PNG"
