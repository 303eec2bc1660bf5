"""The lexicon's reward by hand, and that no text breaks it."""

import numpy as np

from rlhf_jax.rewards import sentiment


def test_by_hand():
    twenty_five = "the " * 22 + "happy happy sad"
    found = sentiment.sentiment_reward(
        [
            "They laughed. They were HAPPY!",  # 2 in 5 words, which count as 20
            "unhappy happily",  # words, not parts of words
            twenty_five,  # 1 in 25
            "happy " * 500,
            "sad " * 500,
            "",
            "\x00 123 ...",
        ]
    )
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [1.0, 0.0, 0.4, 10.0, -10.0, 0.0, 0.0], atol=1e-6)


def test_no_word_is_both():
    assert not sentiment.POSITIVE & sentiment.NEGATIVE


def test_hostile_text_is_only_text():
    (found,) = sentiment.sentiment_reward(["good " + "x" * 1_000_000 + "\ud800 \u202e"])
    assert found == 0.5
