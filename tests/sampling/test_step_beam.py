"""Beam search over steps on trees that are written down: what is drawn, what is kept, and where it ends."""

import itertools

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.sampling.step_beam import step_beam

# Steps are single ids 1 and 2; a response ends after three. The scores of beginnings, for prompt 0:
SCORES = {
    (1,): 0.9,
    (2,): 0.8,
    (1, 1): 0.1,
    (1, 2): 0.2,
    (2, 1): 0.7,
    (2, 2): 0.3,
    (1, 1, 1): 0.0,
    (1, 1, 2): 1.0,
    (1, 2, 1): 0.1,
    (1, 2, 2): 0.15,
    (2, 1, 1): 0.6,
    (2, 1, 2): 0.65,
    (2, 2, 1): 0.2,
    (2, 2, 2): 0.99,
}


def make(seen):
    """Draws 1, 2, 1, 2, ... for the continuations of a place, so that every one is drawn."""

    def extend(places, number):
        seen.append((number, list(places)))
        turns = itertools.cycle((1, 2))
        return [((next(turns),), len(said) == 2) for _, said in places]

    def score(places):
        return [SCORES[said] * (1 if prompt == 0 else -1) for prompt, said in places]

    return extend, score


def search(seen=None, **changes):
    extend, score = make([] if seen is None else seen)
    return step_beam(2, extend, score, **({"width": 1, "expansions": 2, "max_steps": 5} | changes))


def test_a_beam_of_one_follows_the_best_step_and_a_wide_one_finds_the_best_response():
    greedy, against = search()
    # 1 (0.9), then 1 2 (0.2) over 1 1 (0.1), then 1 2 2: the best step is not on the way to the best response.
    assert (greedy.response, greedy.score, greedy.ended) == ((1, 2, 2), 0.15, True)
    # The second prompt's scores are the first's with the other sign: 2, then 2 2, then 2 2 1.
    assert (against.response, against.score) == ((2, 2, 1), -0.2)
    two = search(width=2)[0]
    # 1 and 2 are kept, then 2 1 (0.7) and 2 2 (0.3), then 2 2 2 (0.99).
    assert (two.response, two.score) == ((2, 2, 2), 0.99)
    assert search(width=4)[0].response == (1, 1, 2), "all beginnings of two steps are kept: the best of all"


def test_what_is_drawn_and_that_no_text_is_kept_twice():
    seen = []
    search(seen, width=2)
    assert [number for number, _ in seen] == [0, 1, 2], "all have ended after three rounds"
    assert seen[0][1] == [(0, ())] * 4 + [(1, ())] * 4
    # Four draws gave 1, 2, 1, 2: two distinct beginnings, each continued twice.
    assert seen[1][1][:4] == [(0, (1,))] * 2 + [(0, (2,))] * 2


def test_what_has_ended_competes_and_is_not_continued():
    """Ids: 9 ends. The first round gives an end that scores 0.5; what goes on scores 0.6 and then 0.4."""
    calls = []

    def extend(places, number):
        calls.append(list(places))
        return [((9,), True), ((1,), False)] if number == 0 else [((9,), True)] * len(places)

    def score(places):
        return [{(9,): 0.5, (1,): 0.6, (1, 9): 0.4}[said] for _, said in places]

    (best,) = step_beam(1, extend, score, width=2, expansions=1, max_steps=9)
    assert best.response == (9,) and calls[1] == [(0, (1,))]
    # Out of rounds: an end counts for more than a beginning with a better score.
    (cut,) = step_beam(1, extend, score, width=2, expansions=1, max_steps=1)
    assert cut.response == (9,) and cut.ended


@pytest.mark.parametrize("name", ["width", "expansions", "max_steps"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(InputError, match=f"{name} of the beam is 0: give at least 1"):
        search(**{name: 0})
