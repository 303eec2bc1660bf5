"""Whether a reward model's margins mean what Bradley-Terry says they mean. Imports NumPy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def reliability(margins: np.ndarray, num_bins: int = 10) -> list[dict[str, float]]:
    """Confidence against accuracy, in bins of equally many pairs (Guo et al. 2017, section 2).

    A margin m = r(chosen) - r(rejected) predicts the side of the larger reward with confidence sigmoid(|m|),
    and is right where m > 0. Returns one dict a bin: mean ``confidence``, ``accuracy`` and ``count``, by rising
    confidence.

    Args:
      margins: [N] float, at least one.
      num_bins: bins; fewer come back where there are fewer pairs.
    """
    margins = np.asarray(margins, np.float64)
    order = np.argsort(np.abs(margins), kind="stable")
    bins = [part for part in np.array_split(order, num_bins) if part.size]
    return [
        {
            "confidence": float(np.mean(1.0 / (1.0 + np.exp(-np.abs(margins[part]))))),
            "accuracy": float(np.mean((1 + np.sign(margins[part])) / 2)),  # a tie is half right
            "count": int(part.size),
        }
        for part in bins
    ]


def expected_calibration_error(curve: Sequence[dict[str, float]]) -> float:
    """The mean over pairs of |accuracy - confidence| of their bin (Guo et al. 2017, equation 3)."""
    counts = np.array([point["count"] for point in curve], np.float64)
    gaps = np.array([abs(point["accuracy"] - point["confidence"]) for point in curve])
    return float((counts * gaps).sum() / counts.sum())
