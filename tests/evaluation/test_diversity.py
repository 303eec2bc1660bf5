"""Distinct-n on texts that are counted by hand."""

import pytest

from rlhf_jax.evaluation.diversity import distinct_n


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["a b a b"], 1, 2 / 4),
        (["a b a b"], 2, 2 / 3),  # ab ba ab
        (["a b", "a b"], 2, 1 / 2),  # pooled over texts
        (["a b", "c d"], 2, 1.0),  # no bigram crosses from text to text
        (["a  b\na\tb"], 2, 2 / 3),  # any white space parts words
        (["a"], 2, 0.0),
        (["a", "a b"], 2, 1.0),
        ([], 2, 0.0),
        ([""], 1, 0.0),
        (["a a a a a"], 3, 1 / 3),
    ],
)
def test_by_hand(texts, n, expected):
    assert distinct_n(texts, n) == pytest.approx(expected)
    assert distinct_n(iter(texts), n) == pytest.approx(expected)
