"""Statistics of preference rows against values by hand, loops over annotators, brute force and known opinions."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data.rows import Preference
from rlhf_jax.errors import InputError
from rlhf_jax.evaluation.preference_statistics import (
    agreement,
    consistency,
    leakage,
    length_bias,
    lengths,
    tallies,
)


def pair(chosen, rejected, *, prompt="p", source="s", **given):
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected, source=source, **given)


def test_length_bias_by_hand():
    rows = [
        pair("a" * 10, "b" * 10),  # a tie
        pair("a" * 11, "b" * 10),  # 1.1 still is in the first bin
        pair("a" * 10, "b" * 15),
        pair("a" * 50, "b" * 10),
    ]
    found = length_bias(lengths(rows))
    assert [(one.low, one.high, one.count, one.longer_wins) for one in found] == [
        (1.0, 1.1, 2, 0.75),
        (1.1, 1.5, 1, 0.0),
        (4.0, float("inf"), 1, 1.0),
    ]
    with pytest.raises(InputError, match="no rows: give at least one"):
        lengths([])


def test_repeats_and_contradictions():
    rows = [
        pair("a", "b", source="1"),
        pair("b", "a", source="2"),
        pair("a", "b", source="3"),
        pair("a", "c", source="4"),
        pair("a", "c", source="5"),
        pair("b", "a", prompt="q", source="6"),  # another prompt is another question
    ]
    found = consistency(tallies(rows))
    assert (found.pairs, found.repeated, found.contradicted) == (3, 3, (("1", "2", "3"),))
    assert (found.cyclic_pairs, found.cyclic_prompts) == (0, 0)
    assert found.reachable == pytest.approx(5 / 6)


def _on_a_cycle(edges):
    """Edges of which the end leads back to the start, by walking everywhere."""
    ahead = {}
    for winner, loser in edges:
        ahead.setdefault(winner, set()).add(loser)

    def reached(start):
        seen, waiting = set(), [start]
        while waiting:
            for node in ahead.get(waiting.pop(), ()):
                if node not in seen:
                    seen.add(node)
                    waiting.append(node)
        return seen

    return [(winner, loser) for winner, loser in edges if winner in reached(loser)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans() | st.none(), min_size=10, max_size=10))
def test_cycles_are_those_that_walking_finds_and_the_bound_holds(outcomes):
    names = "abcde"
    edges = [
        (one, other) if won else (other, one)
        for (one, other), won in zip(itertools.combinations(names, 2), outcomes, strict=True)
        if won is not None
    ]
    if not edges:
        return
    found = consistency(tallies([pair(*edge) for edge in edges] + [pair("x", "y", prompt="q")]))
    cyclic = _on_a_cycle(edges)
    assert found.cyclic_pairs == len(cyclic)
    assert found.cyclic_prompts == bool(cyclic)
    best = max(
        sum(order.index(winner) < order.index(loser) for winner, loser in edges)
        for order in itertools.permutations(names)
    )
    assert found.reachable >= (best + 1) / (len(edges) + 1) - 1e-12
    assert (found.reachable == 1.0) == (not cyclic)


def test_two_annotators_agree_as_a_loop_over_annotators_says():
    votes = [(3, 1, 1), (5, 0, 0), (1, 1, 0), (1, 0, 4), (0, 3, 0)]
    rows = [pair("a", "b", prompt=str(place), votes=given) for place, given in enumerate(votes)]
    shares = []
    for won, lost, _ in votes:
        said = [1] * won + [0] * lost
        couples = list(itertools.combinations(said, 2))
        if couples:
            shares.append(sum(a == b for a, b in couples) / len(couples))
    found = agreement(tallies(rows))
    assert found.pairs == 4
    assert found.two_agree == pytest.approx(sum(shares) / len(shares))
    assert found.neither == pytest.approx(5 / 20)
    assert agreement(tallies([pair("a", "b"), pair("a", "c")])) is None
    # Rows without votes are one annotator each: said again, they agree or not.
    repeated = agreement(tallies([pair("a", "b"), pair("b", "a"), pair("a", "b")]))
    assert repeated.two_agree == pytest.approx(1 / 3)


@pytest.mark.parametrize("shape", [0.4, 2.0])
def test_known_opinions_come_back(shape):
    """p ~ Beta(s, s), five annotators a pair: the ceilings are what the best predictor, who knows p, really reaches."""
    rng = np.random.default_rng(7)
    p = rng.beta(shape, shape, 20_000)
    for_first = rng.binomial(5, p)
    rows = [
        pair(
            *(("a", "b") if won >= 3 else ("b", "a")),
            prompt=str(place),
            votes=(max(won, 5 - won), min(won, 5 - won), 0),
        )
        for place, won in enumerate(for_first.tolist())
    ]
    found = agreement(tallies(rows))
    assert found.concentration == pytest.approx(shape, rel=0.05)
    assert found.two_agree == pytest.approx(np.mean(p**2 + (1 - p) ** 2), abs=0.005)
    single = np.mean(np.maximum(p, 1 - p))
    assert found.single == pytest.approx(single, abs=0.005)
    assert found.single_bounds[0] - 0.005 < single < found.single_bounds[1] + 0.005
    assert found.labels == pytest.approx(np.mean((for_first >= 3) == (p > 0.5)), abs=0.005)


def test_the_bounds_of_the_ceiling_are_reached():
    certain = [pair("a", "b", prompt=str(i), votes=(4, 0, 0)) for i in range(3)]
    assert agreement(tallies(certain)).single_bounds == (1.0, 1.0)
    split = [pair("a", "b", prompt=str(i), votes=(2, 2, 0)) for i in range(3)]
    assert agreement(tallies(split)).single_bounds == (0.5, 0.5)


def test_leakage_by_hand():
    train = [pair("a", "b"), pair("c", "d", prompt="q", group="g")]
    other = [
        pair("b", "a"),  # the pair, turned round
        pair("x", "a", prompt="new"),  # a response
        pair("x", "y", prompt="p"),  # a prompt, which is the group
        pair("x", "y", prompt="new", group="g"),  # a group
        pair("x", "y", prompt="new"),
    ]
    found = leakage(train, other)
    assert (found.rows, found.prompts, found.groups, found.responses, found.pairs) == (5, 2, 3, 2, 1)
