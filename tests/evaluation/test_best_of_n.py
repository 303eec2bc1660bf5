"""Best-of-n against brute force over every subset, exact fractions for large n, and enumerated distributions."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.evaluation import best_of_n
from rlhf_jax.evaluation.overoptimization import fit_best_of_n
from rlhf_jax.evaluation.policies import best_of_n_kl


def brute_force(proxy, values, n):
    """Over all subsets of n samples: the mean value of those of the highest proxy."""
    chosen = []
    for subset in itertools.combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in subset)
        tied = [values[i] for i in subset if proxy[i] == top]
        chosen.append(sum(tied) / len(tied))
    return sum(chosen) / len(chosen)


@pytest.mark.parametrize("ties", [False, True])
def test_the_estimator_is_the_mean_over_all_subsets(ties):
    rng = np.random.default_rng(0)
    proxy = rng.integers(0, 4, (3, 9)).astype(float) if ties else rng.normal(size=(3, 9))
    gold = rng.normal(size=(3, 9))
    for n in range(1, 10):
        expected = [brute_force(p, g, n) for p, g in zip(proxy, gold, strict=True)]
        np.testing.assert_allclose(best_of_n.expected_best(proxy, gold, n), expected, rtol=1e-12)


def test_it_is_unbiased_for_fresh_draws():
    """Over the joint distribution of 4 responses drawn N = 3 times, against best-of-2 drawn directly: exact sums."""
    probabilities, proxy = np.array([0.1, 0.4, 0.3, 0.2]), np.array([2.0, 1.0, 1.0, 0.5])
    gold = np.array([-1.0, 3.0, 0.0, 5.0])
    expected = best_of_n.best_of_n_distribution(probabilities, proxy, 2) @ gold
    estimate = 0.0
    for draws in itertools.product(range(4), repeat=3):
        draws = list(draws)
        estimate += (
            probabilities[draws].prod() * best_of_n.expected_best(proxy[None, draws], gold[None, draws], 2)[0]
        )
    assert estimate == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("total", "n"), [(1, 1), (7, 3), (3000, 1), (3000, 1000), (3000, 2999), (3000, 3000)]
)
def test_weights_are_ratios_of_binomials_whatever_their_size(total, n):
    whole = math.comb(total, n)
    expected = [float(Fraction(math.comb(i - 1, n - 1), whole)) for i in range(1, total + 1)]
    found = best_of_n.subset_weights(total, n)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-300)
    assert found.sum() == pytest.approx(1.0, abs=1e-12)


def test_a_hundred_thousand_samples():
    weights = best_of_n.subset_weights(100_000, 1_000)
    assert weights.sum() == pytest.approx(1.0, abs=1e-9)
    # The expected rank of the best of n among N: n (N + 1) / (n + 1).
    assert weights @ np.arange(1, 100_001) == pytest.approx(1000 * 100_001 / 1001, rel=1e-9)


def test_a_curve_of_normal_rewards_follows_order_statistics():
    rng = np.random.default_rng(1)
    proxy = rng.normal(size=(400, 256))
    gold = 0.6 * proxy + rng.normal(size=proxy.shape)
    points = best_of_n.best_of_n_curve(proxy, gold, [1, 2, 16, 256])
    # Expected maxima of n standard normals (Harter 1961).
    for point, maximum in zip(points, (0.0, 0.56419, 1.76599, 2.82), strict=True):
        assert point.kl == pytest.approx(best_of_n_kl(point.n))
        assert point.proxy == pytest.approx(maximum, abs=max(4 * point.proxy_error, 0.01))
        assert point.gold == pytest.approx(0.6 * maximum, abs=4 * point.gold_error)
    # At n = 1 every prompt's estimate is a mean of 256: the standard error over 400 prompts is 1 / sqrt(256 * 400).
    assert points[0].proxy_error == pytest.approx(1 / np.sqrt(256 * 400), rel=0.15)
    assert best_of_n.best_of_n_curve(proxy[:1], gold[:1], [2])[0].gold_error == 0.0
    (pair,) = best_of_n.best_of_n_curve(np.array([[1.0], [3.0]]), np.zeros((2, 1)), [1])
    assert pair.proxy == 2.0 and pair.proxy_error == pytest.approx(1.0)  # sqrt(2) / sqrt(2)


def test_measurements_are_curves_of_sets_of_prompts_from_their_own_start():
    rng = np.random.default_rng(5)
    proxy, gold, ns = rng.normal(size=(7, 20)), rng.normal(size=(7, 20)), [2, 5, 20]
    found = best_of_n.measurements(proxy, gold, ns, num_sets=3)
    assert found.clusters.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for number, prompts in enumerate(([0, 3, 6], [1, 4], [2, 5])):
        curve = best_of_n.best_of_n_curve(proxy[prompts], gold[prompts], [1, *ns])
        here = found.clusters == number
        np.testing.assert_allclose(found.gold[here], [point.gold - curve[0].gold for point in curve[1:]])
        np.testing.assert_allclose(found.proxy[here], [point.proxy - curve[0].proxy for point in curve[1:]])
        np.testing.assert_allclose(found.distance[here], [math.sqrt(point.kl) for point in curve[1:]])
    with pytest.raises(InputError, match="8 sets of 7 prompts"):
        best_of_n.measurements(proxy, gold, ns, num_sets=8)


def test_a_gold_that_turns_is_found_with_its_peak():
    """Gold rises with the proxy up to a point and then falls: where it is greatest in n is where the fit's peak is."""
    rng = np.random.default_rng(6)
    proxy = rng.normal(size=(200, 2000))
    gold = proxy - 0.25 * proxy**2 + rng.normal(size=proxy.shape)
    ns = [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    data = best_of_n.measurements(proxy, gold, ns, num_sets=20)
    fit = fit_best_of_n(data.distance, data.gold, seed=0, clusters=data.clusters)
    curve = data.gold.reshape(20, -1).mean(axis=0)
    assert fit.peak_seen and fit.share_without_peak == 0.0
    assert curve[0] > 0 and abs(fit.peak_gold - curve.max()) < 0.1
    low, high = fit.peak_distance_interval.low, fit.peak_distance_interval.high
    assert low < fit.peak_distance < high < low + 0.2
    best = math.sqrt(best_of_n_kl(ns[int(curve.argmax())]))
    assert abs(fit.peak_distance - best) < 0.4


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_enumerated_distribution_is_that_of_every_draw(n, ties):
    rng = np.random.default_rng(2)
    probabilities, proxy = rng.dirichlet(np.ones(5)), rng.normal(size=5)
    if ties:
        proxy[[1, 3]] = proxy[0]
    expected = np.zeros(5)
    for draws in itertools.product(range(5), repeat=n):
        top = max(proxy[i] for i in draws)
        tied = [i for i in draws if proxy[i] == top]
        for i in tied:
            expected[i] += np.prod(probabilities[list(draws)]) / len(tied)
    found = best_of_n.best_of_n_distribution(probabilities, proxy, n)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    kl = sum(q * math.log(q / p) for q, p in zip(expected, probabilities, strict=True))
    assert best_of_n.enumerated_kl(probabilities, proxy, n) == pytest.approx(kl, abs=1e-12)


@pytest.mark.parametrize("concentration", [0.3, 300.0])
def test_the_kl_from_samples_is_the_enumerated_one(concentration):
    """A language of 6 responses, or of 4,000, sampled 4,000 times to each of 20 prompts."""
    rng = np.random.default_rng(4)
    size = 6 if concentration < 1 else 4000
    probabilities, proxy = rng.dirichlet(np.full(size, concentration)), rng.normal(size=size)
    drawn = rng.choice(size, size=(20, 4000), p=probabilities)
    for n in (1, 2, 8, 64):
        found = best_of_n.sampled_kl(proxy[drawn], np.log(probabilities)[drawn], n)
        exact = best_of_n.enumerated_kl(probabilities, proxy, n)
        error = found.std() / math.sqrt(20)
        assert found.mean() == pytest.approx(exact, abs=2 * error + 0.012 * exact + 1e-3), n
        assert error < 0.05, "what is compared is not noise"
    if size == 4000:
        assert exact == pytest.approx(best_of_n_kl(64), rel=0.01)
    with pytest.raises(InputError, match="KL of best of 501 was asked of .* n of at most an eighth"):
        best_of_n.sampled_kl(proxy[drawn], np.log(probabilities)[drawn], 501)


def test_the_bound_is_met_by_many_rare_responses_and_missed_by_few():
    rng = np.random.default_rng(3)
    for n in (2, 16, 1000):
        many = np.full(200_000, 1 / 200_000)
        exact = best_of_n.enumerated_kl(many, rng.normal(size=200_000), n)
        # Short of the bound by n^2 / (24 N^2), the error of a sum over N steps for an integral.
        assert best_of_n_kl(n) - exact == pytest.approx(n**2 / 24 / 200_000**2, rel=0.1, abs=1e-9)
    # Four equally likely responses: at most log 4 nats, whatever n.
    few = [best_of_n.enumerated_kl(np.full(4, 0.25), np.arange(4.0), n) for n in (1, 4, 64, 100_000)]
    assert few[0] == 0.0 and few == sorted(few)
    assert few[-1] == pytest.approx(math.log(4)) and best_of_n_kl(100_000) > 10
    # A constant proxy chooses nothing.
    assert best_of_n.enumerated_kl(np.full(4, 0.25), np.zeros(4), 64) == pytest.approx(0.0, abs=1e-12)


def test_a_kl_measured_from_draws_agrees_with_the_enumerated_one():
    rng = np.random.default_rng(4)
    probabilities, proxy, n = rng.dirichlet(np.full(30, 0.5)), rng.normal(size=30), 8
    draws = rng.choice(30, size=(200_000, n), p=probabilities)
    best = draws[np.arange(len(draws)), proxy[draws].argmax(axis=1)]
    seen = np.bincount(best, minlength=30) / len(best)
    measured = sum(q * math.log(q / p) for q, p in zip(seen, probabilities, strict=True) if q > 0)
    exact = best_of_n.enumerated_kl(probabilities, proxy, n)
    assert measured == pytest.approx(exact, abs=0.01)
    assert exact < best_of_n_kl(n) - 0.04  # the formula overstates it here


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: best_of_n.expected_best(np.zeros((2, 4)), np.zeros((2, 4)), 5),
            "best of 5 was asked of 4 samples",
        ),
        (lambda: best_of_n.expected_best(np.zeros((2, 4)), np.zeros((2, 4)), 0), "best of 0"),
        (lambda: best_of_n.expected_best(np.zeros((2, 4)), np.zeros((2, 3)), 1), "for the same samples"),
        (lambda: best_of_n.expected_best(np.zeros(4), np.zeros(4), 1), r"give \[prompts"),
        (
            lambda: best_of_n.expected_best(np.zeros((1, 2)), np.array([[0.0, np.nan]]), 1),
            "prompt 0, sample 1 is nan",
        ),
        (lambda: best_of_n.best_of_n_distribution([0.5, 0.6], [0.0, 1.0], 2), "sum to 1.1"),
        (lambda: best_of_n.best_of_n_distribution([1.0, 0.0], [0.0, 1.0], 2), "leave out"),
        (lambda: best_of_n.best_of_n_distribution([0.5, 0.5], [0.0, np.inf], 2), "finite number"),
        (lambda: best_of_n.enumerated_kl([0.5, 0.5], [0.0, 1.0], 0), "best of 0"),
    ],
)
def test_what_has_no_answer_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
