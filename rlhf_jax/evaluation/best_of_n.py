"""What best-of-n is worth, for every n at once, from N samples a prompt; imports errors, policies and numpy.

Best-of-n draws n responses and keeps the one that the proxy likes best. Drawing n afresh for every n wastes samples:
all subsets of n among N >= n samples are averaged here in closed form (Nakano et al. 2021, WebGPT, appendix I; Gao,
Schulman & Hilton 2023).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.evaluation.policies import best_of_n_kl


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfN:
    """Best-of-n over a set of prompts.

    kl: nats to the policy that was sampled, an upper bound (``policies.best_of_n_kl``). proxy, gold: means over
    prompts. proxy_error, gold_error: their standard errors over prompts, 0 for a single one.
    """

    n: int
    kl: float
    proxy: float
    gold: float
    proxy_error: float
    gold_error: float


def subset_weights(total: int, n: int) -> np.ndarray:
    """P(the i-th lowest of ``total`` samples is the highest of n drawn without replacement), [total] float64.

    C(i-1, n-1) / C(total, n), i = 1...total. Its ratios (i - n + 1) / i are multiplied from the top down, so that
    binomials of thousands never appear; what is below 1e-308 is 0.
    """
    if not 1 <= n <= total:
        raise InputError(
            f"best of {n} was asked of {total} samples: give n between 1 and the number of samples"
        )
    i = np.arange(1, total, dtype=np.float64)
    ratios = np.maximum(i - n + 1, 0.0) / i
    return (n / total) * np.append(np.cumprod(ratios[::-1])[::-1], 1.0)


def expected_best(proxy: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """The expected value of the best of n by proxy, for each prompt: an unbiased estimate.

    It equals the mean over all subsets of n samples of the value of the one with the highest proxy, where samples that
    tie are equally likely to be chosen.

    Args:
      proxy: [P, N] float, what chooses.
      values: [P, N] float, what is measured: gold, or the proxy itself.
      n: 1 to N.

    Returns:
      [P] float64.

    Raises:
      InputError: shapes that differ, a value that is not finite, or n outside of 1 to N.
    """
    proxy, values = _samples("proxy", proxy), _samples("values", values)
    if proxy.shape != values.shape:
        raise InputError(
            f"proxy has shape {list(proxy.shape)} and values {list(values.shape)}: give both for the same samples"
        )
    weights = subset_weights(proxy.shape[1], n)
    return np.array([weights @ _ranked(*row) for row in zip(proxy, values, strict=True)])


def _ranked(proxy: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values from the lowest proxy to the highest, each replaced by the mean over those that tie with it."""
    _, group, counts = np.unique(proxy, return_inverse=True, return_counts=True)
    means = np.bincount(group, weights=values) / counts
    return np.repeat(means, counts)


def best_of_n_curve(proxy: np.ndarray, gold: np.ndarray, ns: Sequence[int]) -> list[BestOfN]:
    """`BestOfN` for each of ``ns``, from the same samples [P, N]; neighbours are therefore correlated."""
    points = []
    for n in ns:
        by_proxy, by_gold = expected_best(proxy, proxy, n), expected_best(proxy, gold, n)
        points.append(
            BestOfN(
                n=n,
                kl=best_of_n_kl(n),
                proxy=float(by_proxy.mean()),
                gold=float(by_gold.mean()),
                proxy_error=_standard_error(by_proxy),
                gold_error=_standard_error(by_gold),
            )
        )
    return points


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurements:
    """What ``overoptimization.fit_best_of_n`` takes, M measurements.

    distance: [M] sqrt of the KL bound. proxy, gold: [M] gained over the policy that was sampled. clusters: [M] int,
    which set of prompts a measurement comes from; those of one set share their samples.
    """

    distance: np.ndarray
    proxy: np.ndarray
    gold: np.ndarray
    clusters: np.ndarray


def measurements(proxy: np.ndarray, gold: np.ndarray, ns: Sequence[int], *, num_sets: int) -> Measurements:
    """A curve over ``ns`` for each of ``num_sets`` sets of prompts, less what the set's responses are worth at n = 1.

    The points of one curve share their samples, so that their noise tells nothing about the fit; sets of prompts are
    independent. Prompts go to the sets in turn.

    Args:
      proxy: [P, N] float. gold: [P, N] float.
      ns: from 2 on; at 1 a gain is 0 by definition.
      num_sets: 3 to P; ten or more for intervals that can be trusted.

    Raises:
      InputError: as `expected_best`, or fewer prompts than sets.
    """
    proxy, gold = _samples("proxy", proxy), _samples("gold", gold)
    if not 3 <= num_sets <= len(proxy):
        raise InputError(
            f"{num_sets} sets of {len(proxy)} prompts were asked for: give 3 sets or more, no more than prompts"
        )
    sets = np.arange(len(proxy)) % num_sets
    gains = []
    for values in (proxy, gold):
        gain = np.stack([expected_best(proxy, values, n) for n in ns], axis=1) - values.mean(
            axis=1, keepdims=True
        )
        gains.append(np.concatenate([gain[sets == number].mean(axis=0) for number in range(num_sets)]))
    return Measurements(
        distance=np.tile(np.sqrt([best_of_n_kl(n) for n in ns]), num_sets),
        proxy=gains[0],
        gold=gains[1],
        clusters=np.repeat(np.arange(num_sets), len(ns)),
    )


def best_of_n_distribution(probabilities: np.ndarray, proxy: np.ndarray, n: int) -> np.ndarray:
    """How likely best-of-n says each of K responses, [K] float64, where all of them can be enumerated.

    Responses of one proxy share F(r)^n - F(r-)^n in proportion to their probability, F being the distribution of the
    proxy (Beirami et al. 2024, lemma 1, with ties).

    Args:
      probabilities: [K] float, of the policy that is sampled; they sum to 1.
      proxy: [K] float.
      n: 1 or more.
    """
    probabilities, group, mass, share = _tie_groups(probabilities, proxy, n)
    return probabilities / mass[group] * share[group]


def enumerated_kl(probabilities: np.ndarray, proxy: np.ndarray, n: int) -> float:
    """KL(best-of-n || policy) in nats, exactly, over K responses; see `best_of_n_distribution`.

    It is at most `best_of_n_kl`, and below it where single responses, or ties, have much of the probability. With
    probabilities 1/N it is the plug-in estimate from N samples, which tends to the truth from below as N grows.
    """
    _, _, mass, share = _tie_groups(probabilities, proxy, n)
    present = share > 0
    kl = float(np.sum(share[present] * np.log(share[present] / mass[present])))
    return max(kl, 0.0)  # rounding alone goes below


def sampled_kl(proxy: np.ndarray, log_probs: np.ndarray, n: int) -> np.ndarray:
    """KL(best-of-n || policy) in nats for each prompt, estimated from N samples of the policy.

    Best-of-n says y with probability F(y)^n - (F(y) - p(y))^n, F being the distribution of the proxy: p(y) is known,
    and F(y) is where y stands among the samples. The estimate is the mean over samples of w log w, w = best-of-n(y) /
    p(y). It is below `best_of_n_kl` where single responses have much of the probability. Noise in F makes it some 1%
    too high at n of N / 64, more above.

    Args:
      proxy: [P, N] float; responses of one proxy are taken for one where their log-probs are equal too.
      log_probs: [P, N] float, nats, of whole responses under the policy.
      n: 1 to N / 8: beyond, too few samples lie where best-of-n is.

    Returns:
      [P] float64.

    Raises:
      InputError: shapes that differ, a value that is not finite, or n out of range.
    """
    proxy, log_probs = _samples("proxy", proxy), _samples("log_probs", log_probs)
    if proxy.shape != log_probs.shape or not 1 <= n <= proxy.shape[1] / 8:
        raise InputError(
            f"the KL of best of {n} was asked of proxies {list(proxy.shape)} and log-probs {list(log_probs.shape)}: "
            "give both for the same samples, and n of at most an eighth of them"
        )
    return np.array([_sampled_kl(*row, n) for row in zip(proxy, log_probs, strict=True)])


def _sampled_kl(proxy: np.ndarray, log_probs: np.ndarray, n: int) -> float:
    total = len(proxy)
    _, first, group, counts = np.unique(
        np.stack([proxy, log_probs], axis=1),
        axis=0,
        return_index=True,
        return_inverse=True,
        return_counts=True,
    )
    values, place = np.unique(proxy[first], return_inverse=True)
    mass = np.bincount(place, weights=np.exp(log_probs[first]))
    share = np.bincount(place, weights=counts) / total
    above = np.append(np.cumsum(share[::-1])[::-1][1:], 0.0)
    # A sample stands for a slice of width 1 / total below 1 - above; a response that is rarer lies in its middle.
    top = 1.0 - above - np.maximum(1.0 / total - mass, 0.0) / 2
    inside = np.clip(mass / top, 0.0, 1.0)
    with np.errstate(divide="ignore"):  # all that is at or below has this value
        weight = top**n * -np.expm1(n * np.log1p(-inside)) / mass
    terms = weight * np.log(np.maximum(weight, 1e-300))
    return float(terms[place][group.reshape(-1)].mean())


def _tie_groups(
    probabilities: np.ndarray, proxy: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(probabilities, which distinct proxy each response has, the mass of each before, and after, the best of n)."""
    probabilities, proxy = np.asarray(probabilities, np.float64), np.asarray(proxy, np.float64)
    if n < 1:
        raise InputError(f"best of {n} was asked for: give n of at least 1")
    if probabilities.ndim != 1 or probabilities.shape != proxy.shape or not np.isfinite(proxy).all():
        raise InputError(
            f"probabilities have shape {list(probabilities.shape)} and the proxy {list(proxy.shape)}: give one finite "
            "number of each for every response"
        )
    if (probabilities <= 0).any() or abs(probabilities.sum() - 1.0) > 1e-6:
        raise InputError(
            f"probabilities sum to {probabilities.sum():.6g}, the smallest is {probabilities.min():.3g}: leave out "
            "responses of probability 0, and divide by the sum"
        )
    _, group = np.unique(proxy, return_inverse=True)
    mass = np.bincount(group, weights=probabilities)
    above = np.append(np.cumsum(mass[::-1])[::-1][1:], 0.0)
    below_or_at = np.minimum(1.0 - above, 1.0)
    # F^n - (F - m)^n = F^n (1 - (1 - m/F)^n), without cancellation.
    inside = np.clip(mass / below_or_at, 0.0, 1.0)
    with np.errstate(divide="ignore"):  # the lowest response: 1 - m/F is 0
        share = below_or_at**n * -np.expm1(n * np.log1p(-inside))
    return probabilities, group, mass, share


def _samples(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or values.size == 0:
        raise InputError(f"{name} has shape {list(values.shape)}: give [prompts, samples a prompt]")
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise InputError(
            f"{name} of prompt {row}, sample {column} is {values[row, column]}: leave that sample out of every prompt"
        )
    return values


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
