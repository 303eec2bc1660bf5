"""Fitted curves: exact on exact data, intervals that cover, peaks where calculus puts them, and the figure."""

import math

import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.evaluation import overoptimization as lab
from rlhf_jax.evaluation import plots_style
from rlhf_jax.evaluation.plots_overoptimization import Course, overoptimization_figure

DISTANCE = np.array([0.0, 0.3, 0.8, 1.5, 2.0, 2.6, 3.1, 4.0])
FORMS = {
    "best_of_n": (lab.fit_best_of_n, lab.best_of_n_gold, lambda d, a, b: d * (a - b * d)),
    "rl": (lab.fit_rl, lab.rl_gold, lambda d, a, b: d * (a - b * math.log(d)) if d else 0.0),
}


@pytest.mark.parametrize("form", FORMS)
def test_exact_data_give_back_their_coefficients_and_peak(form):
    fit_form, gold_of, by_hand = FORMS[form]
    gold = np.array([by_hand(d, 1.3, 0.4) for d in DISTANCE])
    np.testing.assert_allclose(gold_of(DISTANCE, 1.3, 0.4), gold, atol=1e-12)
    fit = fit_form(DISTANCE, gold, seed=0)
    assert fit.alpha == pytest.approx(1.3) and fit.beta == pytest.approx(0.4)
    assert fit.residual == pytest.approx(0.0, abs=1e-9)
    for interval, value in ((fit.alpha_interval, 1.3), (fit.beta_interval, 0.4)):
        assert interval.low == pytest.approx(value) and interval.high == pytest.approx(value)
    # The peak by searching, not by calculus.
    fine = np.linspace(0.01, 30.0, 300_000)
    values = np.array(gold_of(fine, 1.3, 0.4))
    assert fit.peak_distance == pytest.approx(fine[values.argmax()], abs=1e-3)
    assert fit.peak_gold == pytest.approx(values.max(), rel=1e-6)
    assert fit.peak_seen == (fit.peak_distance <= 4.0)
    assert (form == "best_of_n") == fit.peak_seen and fit.share_without_peak == 0.0


@pytest.mark.parametrize("form", FORMS)
def test_noisy_data_are_fitted_as_by_the_normal_equations(form):
    fit_form, _, by_hand = FORMS[form]
    rng = np.random.default_rng(0)
    gold = np.array([by_hand(d, 1.0, 0.2) for d in DISTANCE]) + 0.1 * rng.normal(size=8)
    design = [[by_hand(d, 1.0, 0.0), by_hand(d, 0.0, 1.0)] for d in DISTANCE]
    a = sum(x * x for x, _ in design)
    b = sum(x * y for x, y in design)
    c = sum(y * y for _, y in design)
    u = sum(x * g for (x, _), g in zip(design, gold, strict=True))
    v = sum(y * g for (_, y), g in zip(design, gold, strict=True))
    alpha, beta = (c * u - b * v) / (a * c - b * b), (a * v - b * u) / (a * c - b * b)
    fit = fit_form(DISTANCE, gold, seed=0)
    assert fit.alpha == pytest.approx(alpha) and fit.beta == pytest.approx(beta)
    squares = sum((g - alpha * x - beta * y) ** 2 for (x, y), g in zip(design, gold, strict=True))
    assert fit.residual == pytest.approx(math.sqrt(squares / 6))


@pytest.mark.parametrize("form", FORMS)
def test_intervals_cover_about_as_often_as_they_say(form):
    fit_form, gold_of, _ = FORMS[form]
    rng, covered, peaks = np.random.default_rng(1), 0, 0
    distance = np.linspace(0.2, 4.0, 20)
    truth = fit_form(distance, gold_of(distance, 1.3, 0.45), seed=0)
    for trial in range(300):
        # Noise that grows with distance, as it does between seeds.
        gold = gold_of(distance, 1.3, 0.45) + 0.1 * distance * rng.normal(size=20)
        fit = fit_form(distance, gold, seed=trial, resamples=300)
        covered += fit.beta_interval.low <= 0.45 <= fit.beta_interval.high
        peaks += fit.peak_distance_interval.low <= truth.peak_distance <= fit.peak_distance_interval.high
    # 95% of 300 is 285; a wild bootstrap of 20 points falls a little short.
    assert 264 <= covered <= 298 and 264 <= peaks <= 298


def test_points_of_one_run_share_their_noise():
    rng = np.random.default_rng(2)
    distance, runs = np.tile(np.linspace(0.3, 3.0, 12), 10), np.repeat(np.arange(10), 12)
    slopes = rng.normal(0.0, 0.3, 10)
    gold = lab.rl_gold(distance, 1.0, 0.3) + slopes[runs] * distance + 0.01 * rng.normal(size=120)
    apart = lab.fit_rl(distance, gold, seed=0)
    together = lab.fit_rl(distance, gold, seed=0, clusters=runs)
    assert together.alpha == apart.alpha

    def width(fit):
        return fit.alpha_interval.high - fit.alpha_interval.low

    # Ten slopes, not 120: +-1.96 * 0.3 / sqrt(10) = 0.37 of width.
    assert 0.25 < width(together) < 0.5 and width(apart) < 0.6 * width(together)


def test_the_seed_decides_the_intervals_and_nothing_else():
    gold = lab.rl_gold(DISTANCE, 1.0, 0.3) + 0.1 * np.sin(9 * DISTANCE)
    one, again, other = (lab.fit_rl(DISTANCE, gold, seed=seed) for seed in (1, 1, 2))
    assert one == again and one != other and one.alpha == other.alpha


def test_gold_that_only_rises_or_only_falls_has_no_peak_inside():
    rising = lab.fit_best_of_n(DISTANCE, DISTANCE + 0.1 * DISTANCE**2, seed=0)
    assert math.isinf(rising.peak_distance) and not rising.peak_seen and rising.share_without_peak == 1.0
    assert math.isinf(rising.peak_gold_interval.high)
    assert math.isinf(lab.fit_rl(DISTANCE, lab.rl_gold(DISTANCE, 1.0, -0.2), seed=0).peak_distance)
    falling = lab.fit_best_of_n(DISTANCE, -DISTANCE - 0.1 * DISTANCE**2, seed=0)
    assert falling.peak_distance == falling.peak_gold == 0.0 and not falling.peak_seen
    # RL's curve begins infinitely steep, so that it always rises at first.
    assert 0.0 < lab.fit_rl(DISTANCE, lab.rl_gold(DISTANCE, -1.0, 0.5), seed=0).peak_distance < 0.1
    # A slope so flat that e^(alpha / beta) overflows.
    assert math.isinf(lab.fit_rl(DISTANCE, lab.rl_gold(DISTANCE, 1.0, 1e-3), seed=0).peak_distance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("distance", "gold", "changes", "message"),
    [
        ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0], {}, "3 measurements at 3 distances"),
        ([0.0, 1.0, 1.0, 2.0, 2.0], [0.0] * 5, {}, "at 2 distances above 0"),
        ([2.0, 2.0 + 1e-8, 2.0 + 2e-8, 2.0 + 3e-8], [1.0] * 4, {}, "too close together"),
        ([1.0, 2.0, 3.0, -1.0], [1.0] * 4, {}, "below 0"),
        ([1.0, 2.0, 3.0, 4.0], [1.0, math.nan, 1.0, 1.0], {}, "gold of measurement 1 is nan"),
        ([1.0, 2.0, math.inf, 4.0], [1.0] * 4, {}, "distance of measurement 2 is inf"),
        ([1.0, 2.0, 3.0, 4.0], [1.0] * 3, {}, "one of each"),
        ([1.0, 2.0, 3.0, 4.0], [1.0] * 4, {"clusters": [0, 0, 1, 1]}, "2 clusters"),
        ([1.0, 2.0, 3.0, 4.0], [1.0] * 4, {"clusters": [0, 1]}, "one of each"),
        ([1.0, 2.0, 3.0, 4.0], [1.0] * 4, {"resamples": 5}, "at least 100"),
        ([], [], {}, "0 measurements"),
    ],
)
def test_data_that_cannot_tell_are_refused(form, distance, gold, changes, message):
    with pytest.raises(InputError, match=message):
        FORMS[form][0](np.array(distance), np.array(gold), seed=0, **changes)


def test_the_figure_draws_what_it_is_given():
    gold = lab.best_of_n_gold(DISTANCE, 2.0, 0.5)
    fit = lab.fit_best_of_n(DISTANCE, gold, seed=0)
    courses = {
        "best_of_n": Course(
            distance=DISTANCE[::-1],
            gold=gold[::-1],
            proxy=(2 * DISTANCE)[::-1],
            curve=lambda d: lab.best_of_n_gold(d, fit.alpha, fit.beta),
            fit=fit,
        ),
        "ppo": Course(distance=[0.0, 1.0], gold=[0.0, 1.0]),
    }
    figure = overoptimization_figure(courses, plots_style.looks(courses))
    (axes,) = figure.axes
    lines = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines]
    points, curve, proxy, other, interval, ring = lines
    np.testing.assert_allclose(points, [DISTANCE, gold])
    np.testing.assert_allclose(proxy, [DISTANCE, 2 * DISTANCE])
    np.testing.assert_allclose(curve[1], [d * (2 - 0.5 * d) for d in curve[0]], atol=1e-9)
    assert curve[0][0] == 0.0 and curve[0][-1] == 4.0 and other == ([0.0, 1.0], [0.0, 1.0])
    np.testing.assert_allclose(interval, [[2.0, 2.0], [2.0, 2.0]])
    np.testing.assert_allclose(ring, [[2.0], [2.0]])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["Best of n: gold, peak 2.00 at KL 4.0", "PPO: gold"]
    np.testing.assert_allclose(
        axes.get_xticks(), np.sqrt([float(t.get_text()) for t in axes.get_xticklabels()])
    )


def test_a_peak_beyond_the_data_is_not_drawn_and_nothing_is_no_figure():
    distance = np.linspace(0.1, 1.0, 8)
    fit = lab.fit_rl(distance, lab.rl_gold(distance, 2.0, 0.5), seed=0)
    assert not fit.peak_seen
    figure = overoptimization_figure(
        {"ppo": Course(distance=distance, gold=distance, fit=fit)}, plots_style.looks(["ppo"])
    )
    assert len(figure.axes[0].lines) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["PPO: gold"]
    with pytest.raises(InputError, match="no courses"):
        overoptimization_figure({}, {})
    with pytest.raises(InputError, match=r"ppo has series of lengths \[1, 2\]"):
        overoptimization_figure({"ppo": Course(distance=[1.0, 2.0], gold=[1.0])}, plots_style.looks(["ppo"]))
