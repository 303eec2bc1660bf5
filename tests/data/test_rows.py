"""Rankings become ranks and pairs, votes become probabilities: each by hand, and against a loop over annotators."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data.rows import (
    Comparison,
    Demonstration,
    Preference,
    Ranking,
    Unpaired,
    group_of,
    label_of,
    pairs,
    ranks,
    soft_label,
    swapped,
)


def _ranking(*comparisons, responses=("a", "b", "c")):
    made = tuple(
        Comparison(first=i, second=j, for_first=x, for_second=y, for_neither=z)
        for i, j, x, y, z in comparisons
    )
    return Ranking(prompt="p", responses=responses, comparisons=made, source="s:1", group="g")


def test_ranks_are_by_comparisons_won_less_lost():
    assert ranks(_ranking((0, 1, 1, 2, 0), (0, 2, 3, 0, 0), (1, 2, 3, 0, 0))) == (1, 0, 2)
    # A cycle is a tie of all three.
    assert ranks(_ranking((0, 1, 1, 0, 0), (1, 2, 1, 0, 0), (0, 2, 0, 1, 0))) == (0, 0, 0)
    assert ranks(_ranking((0, 1, 1, 1, 1), (0, 2, 1, 0, 0), (1, 2, 1, 0, 0))) == (0, 0, 2)


@given(st.permutations(range(4)))
def test_one_annotators_order_comes_back(order):
    comparisons = [
        (i, j, int(order[i] < order[j]), int(order[j] < order[i]), 0)
        for i in range(4)
        for j in range(i + 1, 4)
    ]
    row = _ranking(*comparisons, responses=tuple("abcd"))
    assert list(ranks(row)) == list(order)
    found = pairs(row)
    assert len(found) == 6
    for pair in found:
        assert order["abcd".index(pair.chosen)] < order["abcd".index(pair.rejected)]
        assert (pair.group, pair.votes) == ("g", (1, 0, 0))
    assert len({pair.source for pair in found}) == 6


def test_pairs_leave_out_ties_and_keep_the_votes_of_either_side():
    found = pairs(_ranking((0, 1, 1, 4, 2), (0, 2, 2, 2, 0), (1, 2, 3, 0, 1)))
    assert [(row.chosen, row.rejected, row.votes, row.source) for row in found] == [
        ("b", "a", (4, 1, 2), "s:1/0-1"),
        ("b", "c", (3, 0, 1), "s:1/1-2"),
    ]


def _pair(**given):
    return Preference(prompt="p", chosen="c", rejected="r", source="s", **given)


def test_soft_labels_by_hand():
    assert soft_label(_pair()) == 1.0
    assert soft_label(_pair(votes=(5, 0, 0))) == 1.0
    assert soft_label(_pair(votes=(3, 1, 1))) == pytest.approx(0.7)
    assert soft_label(_pair(votes=(2, 2, 1))) == 0.5
    assert soft_label(_pair(votes=(1, 3, 1))) == pytest.approx(0.3)  # the label went against the majority
    assert soft_label(_pair(votes=(5, 0, 0)), prior=1.0) == pytest.approx(6 / 7)
    assert soft_label(_pair(votes=(5, 0, 0), probability=0.8)) == 0.8


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.floats(0.01, 5))
def test_soft_labels_of_the_two_sides_add_up_to_one(won, lost, neither, prior):
    one, other = (
        soft_label(_pair(votes=(a, b, neither)), prior=prior) for a, b in ((won, lost), (lost, won))
    )
    assert one + other == pytest.approx(1)
    assert 0 < one < 1


def test_groups():
    assert group_of(Demonstration(prompt="p", response="r", source="s")) == "p"
    assert group_of(Demonstration(prompt="p", response="r", source="s", group="g")) == "g"
    assert group_of(Unpaired(prompt="", response="r", desirable=True, source="s")) == "r"


def test_a_swapped_pair_is_the_same_comparison_from_the_other_side():
    pair = Preference(
        prompt="p",
        chosen="a",
        rejected="b",
        source="s",
        probability=0.9,
        chosen_gold=1.0,
        rejected_gold=2.0,
        votes=(3, 1, 0),
        target=0.8,
        labels=(("good", 1.0), ("safe", 0.25)),
    )
    other = swapped(pair)
    assert (other.chosen, other.rejected, other.chosen_gold, other.rejected_gold) == ("b", "a", 2.0, 1.0)
    assert [label_of(other, name) for name in ("good", "safe", "kind")] == [0.0, 0.75, None]
    # Whoever swaps has another label in mind, of which these say nothing.
    assert (other.probability, other.votes, other.target) == (None, None, None)
