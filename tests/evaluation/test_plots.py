"""Figures draw the numbers they are given, and the overview is a picture of the ladder."""

import math

import numpy as np
import pytest
from PIL import Image

from rlhf_jax.evaluation import plots, plots_style
from rlhf_jax.evaluation.report_files import Point

POINTS = [Point(step=10 * n, kl=float(n * n), proxy=float(n), gold=g) for n, g in enumerate((1.0, 4.0, 2.0))]


def drawn(figure):
    return [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in figure.axes[0].lines]


def test_reward_is_drawn_against_the_root_of_kl():
    looks = plots_style.looks(["ppo", "dpo"])
    policies = {"ppo": {"kl": 9.0, "gold": 9.0}, "dpo": {"kl": 2.25, "gold": 1.75}, "odd": {"kl": 1.0}}
    figure = plots.distance_figure({"ppo": POINTS}, policies, looks, "gold")
    course, point, ring = drawn(figure)
    assert course == ([0.0, 1.0, 2.0], [1.0, 4.0, 2.0])
    assert point == ([1.5], [1.75])
    assert ring == ([1.0], [4.0])
    assert [text.get_text() for text in figure.axes[0].texts] == ["peak 4.00"]
    without_rings = plots.distance_figure({"ppo": POINTS}, policies, looks, "proxy")
    assert drawn(without_rings) == [([0.0, 1.0, 2.0], [0.0, 1.0, 2.0])]


@pytest.mark.parametrize("top", [3e-4, 0.02, 0.9, 4.0, 38.0, 700.0])
def test_ticks_of_kl_stand_at_the_roots_of_their_labels(top):
    points = [Point(step=n, kl=kl, proxy=1.0, gold=None) for n, kl in enumerate((0.0, top))]
    axes = plots.distance_figure({"ppo": points}, {}, plots_style.looks(["ppo"]), "proxy").axes[0]
    labels = [float(label.get_text()) for label in axes.get_xticklabels()]
    places = axes.get_xticks()
    np.testing.assert_allclose(places, np.sqrt(labels), rtol=1e-6)
    assert labels[0] == 0.0 and len(labels) >= 4
    assert labels == sorted(labels) and labels[-1] <= axes.get_xlim()[1] ** 2
    assert np.diff(places).min() > 0.1 * math.sqrt(top)


def test_a_kl_a_hair_below_zero_is_zero():
    points = [Point(step=0, kl=-1e-9, proxy=1.0, gold=None), Point(step=1, kl=4.0, proxy=2.0, gold=None)]
    figure = plots.distance_figure({"ppo": points}, {}, plots_style.looks(["ppo"]), "proxy")
    assert drawn(figure) == [([0.0, 2.0], [1.0, 2.0])]
    assert drawn(plots.distance_figure({"ppo": points}, {}, plots_style.looks(["ppo"]), "gold")) == []


@pytest.mark.parametrize("window", [1, 2, 5, 9])
def test_running_mean_against_a_loop(window):
    values = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0]
    expected = []
    for i in range(len(values)):
        near = [values[j] for j in range(len(values)) if abs(i - j) <= window // 2]
        expected.append((i * 3, sum(near) / len(near)))
    found = plots.running_mean([(i * 3, value) for i, value in enumerate(values)], window)
    assert [step for step, _ in found] == [step for step, _ in expected]
    np.testing.assert_allclose([v for _, v in found], [v for _, v in expected], atol=1e-12)


def test_a_curve_shows_every_value_its_mean_and_what_was_held_out():
    train = [(step, float(step % 3)) for step in range(1, 31)]
    every, mean, rings = drawn(plots.curve_figure(train, [(0, 5.0), (30, 4.0)], "#123456", window=3))
    assert every == ([s for s, _ in train], [v for _, v in train])
    assert mean[1][1:-1] == [1.0] * 28
    assert rings == ([0, 30], [5.0, 4.0])


def test_a_constant_is_a_flat_line_in_the_middle():
    figure = plots.curve_figure([(n, 0.1 + 1e-17 * n) for n in range(1, 100)], [], "#123456", window=4)
    low, high = figure.axes[0].get_ylim()
    assert low < 0.09 and high > 0.11


def test_long_series_are_thinned_but_keep_their_ends():
    series = [(step, float(step)) for step in range(5003)]
    ((steps, values),) = drawn(plots.curve_figure(series, [], "#123456", window=1))
    assert len(steps) <= plots.MAX_DRAWN + 1 and (steps[0], steps[-1], values[-1]) == (0, 5002, 5002.0)


@pytest.mark.parametrize(
    "margins",
    [[0.5, -0.25, 2.0, 0.125, 0.0], [-3.0, -1.0], [7.0], [0.0], [1000.0, 1000.001], [1.0, math.nan, -1.0]],
)
def test_every_margin_falls_on_its_own_side_of_zero(margins):
    figure = plots.margins_figure(margins, "#123456")
    wrong, right = figure.axes[0].containers
    assert sum(bar.get_height() for bar in right) == sum(m > 0 for m in margins)
    assert sum(bar.get_height() for bar in wrong) == sum(m <= 0 for m in margins)
    assert all(bar.get_x() >= -1e-9 for bar in right if bar.get_height())
    assert all(bar.get_x() + bar.get_width() <= 1e-9 for bar in wrong if bar.get_height())


def test_reliability_and_accuracy_draw_their_numbers():
    curve = [
        {"confidence": 0.6, "accuracy": 0.4, "count": 3},
        {"confidence": 0.9, "accuracy": 0.95, "count": 3},
    ]
    figure = plots.reliability_figure(curve, "#123456")
    assert drawn(figure)[1] == ([0.6, 0.9], [0.4, 0.95])
    assert figure.axes[0].get_ylim()[0] < 0.4
    bars = plots.accuracy_figure([("longer", 0.45, "#111111"), ("model", 0.75, "#222222")]).axes[0]
    ends = [bar.get_x() + bar.get_width() for bar in bars.patches]
    np.testing.assert_allclose(ends, [0.45, 0.75])
    assert {"45.0%", "75.0%"} <= {text.get_text() for text in bars.texts}


def test_a_policy_keeps_its_look_and_strangers_get_their_own():
    looks = plots_style.looks(["mine", "ppo", "yours", "mine"])
    assert looks["ppo"] is plots_style.KNOWN["ppo"] and list(looks) == ["mine", "ppo", "yours"]
    colors = [look.color for look in (*looks.values(), *plots_style.KNOWN.values())]
    assert len(set(colors)) == len(colors) - 1  # ppo, twice
    for theme in (plots_style.css_colors(dark=False), plots_style.css_colors(dark=True)):
        assert all(f"--{look.css}: #" in theme for look in looks.values())


def test_svg_names_its_colours_and_nothing_outside_itself():
    look = plots_style.KNOWN["ppo"]
    figure = plots.distance_figure({"ppo": POINTS}, {}, {"ppo": look}, "gold")
    figure.axes[0].set_title('</svg><script>1</script> $x^2$ #0072b2 id="q"')
    svg = plots_style.to_svg(figure, name="one", description='a "quoted" <thing>')
    assert f"var(--{look.css})" in svg and svg.lower().count(look.color) == 1  # in the title
    assert "http" not in svg and "<style" not in svg and "<metadata" not in svg and "<script" not in svg
    assert '>&lt;/svg&gt;&lt;script&gt;1&lt;/script&gt; $x^2$ #0072b2 id="q"</text>' in svg
    assert 'aria-label="a &quot;quoted&quot; &lt;thing&gt;"' in svg
    assert "DejaVu" not in svg and 'id="one-' in svg and "url(#one-" in svg
    again = plots.distance_figure({"ppo": POINTS}, {}, {"ppo": look}, "gold")
    twice = [plots_style.to_svg(again, name="one", description="") for _ in range(2)]
    assert twice[0] == twice[1]


def test_the_overview_is_wide_and_shows_both_courses(ladder, tmp_path):
    path = plots.save_overview(ladder, tmp_path / "overview.png")
    image = Image.open(path).convert("RGB")
    width, height = image.size
    assert width >= 1800 and width > 2 * height
    pixels = np.asarray(image).reshape(-1, 3)
    left = np.asarray(image)[:, : width // 2].reshape(-1, 3)
    for name, where in (("ppo", left), ("ppo_no_leash", left), ("dpo", pixels), ("best_of_n", pixels)):
        color = [int(plots_style.KNOWN[name].color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (where == color).all(axis=1).sum() > 500, name
    plots.save_overview(ladder, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == path.read_bytes()
