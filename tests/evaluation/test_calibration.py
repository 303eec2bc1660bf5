"""Reliability and its error, worked by hand and against a reward model that means what it says."""

import math

import numpy as np
import pytest

from rlhf_jax.evaluation.calibration import expected_calibration_error, reliability


def test_two_bins_by_hand():
    # sigmoid(log 3) = 3/4 and sigmoid(log 9) = 9/10: the two least sure pairs, then the two surest.
    curve = reliability([math.log(9), -math.log(3), math.log(3), -math.log(9)], num_bins=2)
    assert [point["count"] for point in curve] == [2, 2]
    np.testing.assert_allclose([point["confidence"] for point in curve], [0.75, 0.9])
    assert [point["accuracy"] for point in curve] == [0.5, 0.5]
    # (|0.5 - 0.75| * 2 + |0.5 - 0.9| * 2) / 4
    assert expected_calibration_error(curve) == pytest.approx(0.325)


def test_unequal_bins_weigh_by_their_pairs():
    curve = reliability([math.log(3), math.log(3), math.log(9)], num_bins=2)
    assert [point["count"] for point in curve] == [2, 1]
    assert expected_calibration_error(curve) == pytest.approx((2 * 0.25 + 1 * 0.1) / 3)


def test_a_tie_is_half_sure_and_half_right():
    assert reliability([0.0]) == [{"confidence": 0.5, "accuracy": 0.5, "count": 1}]


def test_fewer_pairs_than_bins_give_a_bin_each():
    curve = reliability([2.0, -1.0, 0.5], num_bins=10)
    assert [point["count"] for point in curve] == [1, 1, 1]
    assert [point["accuracy"] for point in curve] == [1.0, 0.0, 1.0]
    assert [point["confidence"] for point in curve] == sorted(point["confidence"] for point in curve)


def test_huge_margins_do_not_overflow():
    (point,) = reliability([1e4, -1e4], num_bins=1)
    assert point == {"confidence": 1.0, "accuracy": 0.5, "count": 2}


def test_margins_drawn_as_bradley_terry_says_are_calibrated_and_doubled_ones_are_boastful():
    generator = np.random.default_rng(0)
    size = np.abs(generator.normal(0.0, 1.5, 40_000))
    right = generator.random(40_000) < 1.0 / (1.0 + np.exp(-size))
    margins = np.where(right, size, -size)
    curve = reliability(margins)
    # 4000 pairs a bin: the standard error of each accuracy is at most 0.008.
    assert all(abs(point["accuracy"] - point["confidence"]) < 0.03 for point in curve)
    assert expected_calibration_error(curve) < 0.01
    assert expected_calibration_error(reliability(2 * margins)) > 0.08
