"""How gold falls while the proxy rises: curves fitted to gold against distance; imports errors and numpy only.

Gao, Schulman & Hilton (2023, section 3.2), with d = sqrt(KL) to the initial policy and gold measured from it:

    best-of-n  gold(d) = d (alpha - beta d),      greatest alpha^2 / (4 beta) at d = alpha / (2 beta)
    RL         gold(d) = d (alpha - beta log d),  greatest beta d at d = exp(alpha / beta - 1)

Both are linear in alpha and beta, so that least squares is exact, with no start to choose.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from rlhf_jax.errors import InputError

MIN_POINTS = 4
MIN_DISTANCES = 3
# Beyond this, the two columns of the design are one but for rounding.
MAX_CONDITION = 1e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """A 95% interval; an end is infinite where resamples had no peak."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """One fitted curve.

    alpha, beta: coefficients, gold per unit of d and gold per unit of d^2 (best-of-n) or d log d (RL). peak_distance,
    peak_gold: where gold is greatest, in d, and how great; infinite where the curve rises without end. peak_seen:
    whether the peak lies within the distances measured, else it is an extrapolation. residual: standard deviation of
    gold about the curve. *_interval: 95%, from the bootstrap. share_without_peak: of its resamples.
    """

    alpha: float
    beta: float
    peak_distance: float
    peak_gold: float
    peak_seen: bool
    residual: float
    alpha_interval: Interval
    beta_interval: Interval
    peak_distance_interval: Interval
    peak_gold_interval: Interval
    share_without_peak: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Form:
    """One of the two curves: the column that beta multiplies, and where the peak of (alpha, beta) lies."""

    column: Callable[[np.ndarray], np.ndarray]
    peak: Callable[[float, float], tuple[float, float]]


def best_of_n_gold(distance: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """d (alpha - beta d) at each distance."""
    distance = np.asarray(distance, np.float64)
    return alpha * distance + beta * _squared(distance)


def rl_gold(distance: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """d (alpha - beta log d) at each distance; 0 at distance 0, its limit."""
    distance = np.asarray(distance, np.float64)
    return alpha * distance + beta * _d_log_d(distance)


def fit_best_of_n(
    distance: np.ndarray,
    gold: np.ndarray,
    *,
    seed: int,
    clusters: np.ndarray | None = None,
    resamples: int = 2000,
) -> Fit:
    """Fits d (alpha - beta d) to M measurements of best-of-n by least squares, with bootstrap intervals.

    Args:
      distance: [M] float, d = sqrt(KL), 0 or above.
      gold: [M] float, gold reward less that of the initial policy, so that it is 0 at distance 0.
      seed: of the bootstrap.
      clusters: [M] int, which measurements share noise: those of one training run, or of the same samples (see
        `rlhf_jax.evaluation.best_of_n.measurements`). Each is its own where None.
      resamples: of the bootstrap, at least 100.

    The bootstrap is wild (Wu 1986; by clusters Cameron, Gelbach & Miller 2008): distances stay, and the residuals of
    each cluster, scaled up by 1 / sqrt(1 - leverage), get one random sign. Noise may differ from point to point. With
    few clusters (three seeds) there are few signs, and intervals are coarse and too narrow.

    Raises:
      InputError: the data cannot tell alpha and beta: fewer than 4 measurements or 3 distances above 0, distances
        all but equal, fewer than 3 clusters; or shapes that differ, or a number that is not finite.
    """
    return _fit(_Form(column=_squared, peak=_best_of_n_peak), distance, gold, seed, clusters, resamples)


def fit_rl(
    distance: np.ndarray,
    gold: np.ndarray,
    *,
    seed: int,
    clusters: np.ndarray | None = None,
    resamples: int = 2000,
) -> Fit:
    """Fits d (alpha - beta log d) to M measurements of policies trained by RL; everything else is `fit_best_of_n`'s."""
    return _fit(_Form(column=_d_log_d, peak=_rl_peak), distance, gold, seed, clusters, resamples)


def _squared(distance: np.ndarray) -> np.ndarray:
    return -np.square(distance)


def _d_log_d(distance: np.ndarray) -> np.ndarray:
    positive = distance > 0
    return -distance * np.log(np.where(positive, distance, 1.0))


def _best_of_n_peak(alpha: float, beta: float) -> tuple[float, float]:
    if beta < 0 or (beta == 0 and alpha > 0):
        return math.inf, math.inf
    return (alpha / (2 * beta), alpha**2 / (4 * beta)) if alpha > 0 else (0.0, 0.0)


def _rl_peak(alpha: float, beta: float) -> tuple[float, float]:
    if beta < 0 or (beta == 0 and alpha > 0):
        return math.inf, math.inf
    if beta == 0:
        return 0.0, 0.0
    exponent = alpha / beta - 1
    distance = math.exp(exponent) if exponent < 700 else math.inf
    return distance, beta * distance


def _fit(
    form: _Form,
    distance: np.ndarray,
    gold: np.ndarray,
    seed: int,
    clusters: np.ndarray | None,
    resamples: int,
) -> Fit:
    distance, gold, clusters = _checked(distance, gold, clusters)
    if resamples < 100:
        raise InputError(f"{resamples} resamples give no 95% interval: give at least 100")
    design = np.stack([distance, form.column(distance)], axis=1)
    _check_identified(design, distance)
    coefficients, inverse = _solve(design, gold)
    residuals = gold - design @ coefficients
    leverage = np.einsum("mi,ij,mj->m", design, inverse, design)
    scaled = residuals / np.sqrt(np.maximum(1.0 - leverage, 1e-6))
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(resamples, int(clusters.max()) + 1))
    drawn = coefficients + (signs[:, clusters] * scaled) @ design @ inverse
    peaks = np.array([form.peak(alpha, beta) for alpha, beta in drawn.tolist()])
    alpha, beta = coefficients.tolist()
    peak_distance, peak_gold = form.peak(alpha, beta)
    return Fit(
        alpha=alpha,
        beta=beta,
        peak_distance=peak_distance,
        peak_gold=peak_gold,
        peak_seen=bool(0.0 < peak_distance <= distance.max()),
        residual=float(np.sqrt(np.sum(np.square(residuals)) / (len(gold) - 2))),
        alpha_interval=_interval(drawn[:, 0]),
        beta_interval=_interval(drawn[:, 1]),
        peak_distance_interval=_interval(peaks[:, 0]),
        peak_gold_interval=_interval(peaks[:, 1]),
        share_without_peak=float(np.mean(np.isinf(peaks[:, 0]))),
    )


def _solve(design: np.ndarray, gold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares coefficients [2], and (X'X)^-1 [2, 2], by way of X = QR."""
    q, r = np.linalg.qr(design)
    inverse_r = np.linalg.inv(r)
    return inverse_r @ (q.T @ gold), inverse_r @ inverse_r.T


def _interval(values: np.ndarray) -> Interval:
    """Order statistics rather than interpolation, as infinity has no half-way."""
    low, high = np.quantile(values, [0.025, 0.975], method="inverted_cdf")
    return Interval(low=float(low), high=float(high))


def _checked(
    distance: np.ndarray, gold: np.ndarray, clusters: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The data in float64, and clusters numbered from 0."""
    distance, gold = np.asarray(distance, np.float64), np.asarray(gold, np.float64)
    clusters = np.arange(distance.size) if clusters is None else np.asarray(clusters)
    if distance.ndim != 1 or distance.shape != gold.shape or distance.shape != clusters.shape:
        raise InputError(
            f"distance has shape {list(distance.shape)}, gold {list(gold.shape)}, clusters {list(clusters.shape)}: "
            "give one of each for every measurement"
        )
    for name, values in (("distance", distance), ("gold", gold)):
        if not np.isfinite(values).all():
            place = int(np.flatnonzero(~np.isfinite(values))[0])
            raise InputError(f"{name} of measurement {place} is {values[place]}: leave that measurement out")
    if (distance < 0).any():
        raise InputError(f"distance {distance.min():.6g} is below 0: give d = sqrt(KL)")
    numbered = np.unique(clusters, return_inverse=True)[1].reshape(-1)
    if numbered.size and numbered.max() < 2:
        raise InputError(
            f"{numbered.max() + 1} clusters of measurements give no interval: give at least 3 (seeds, or sets of "
            "samples)"
        )
    return distance, gold, numbered


def _check_identified(design: np.ndarray, distance: np.ndarray) -> None:
    apart = np.unique(distance[distance > 0])
    if len(distance) < MIN_POINTS or len(apart) < MIN_DISTANCES:
        raise InputError(
            f"{len(distance)} measurements at {len(apart)} distances above 0 cannot tell alpha and beta: give at least "
            f"{MIN_POINTS} at {MIN_DISTANCES} distances"
        )
    scaled = design / np.linalg.norm(design, axis=0)
    condition = np.linalg.cond(scaled) if np.isfinite(scaled).all() else math.inf
    if condition > MAX_CONDITION:
        raise InputError(
            f"the distances, {apart[0]:.6g} to {apart[-1]:.6g}, are too close together to tell alpha and beta: measure "
            "policies further apart"
        )
