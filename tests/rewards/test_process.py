"""Step scores against loops, what sums to what, and where a reward lands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.rewards import process

RNG = np.random.default_rng(5)
B, S, R = 6, 4, 7
SCORES = RNG.random((B, S)).astype(np.float32)
# Masks with holes, one full, one empty.
MASK = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], bool)


def by_loop(combine):
    rows = [
        [float(s) for s, here in zip(row, mask, strict=True) if here]
        for row, mask in zip(SCORES, MASK, strict=True)
    ]
    return [combine(row) if row else 0.0 for row in rows]


@pytest.mark.parametrize(
    ("function", "combine"),
    [
        (process.minimum_over_steps, min),
        (process.product_over_steps, lambda row: float(np.prod(np.array(row, np.float64)))),
        (process.last_step, lambda row: row[-1]),
    ],
)
def test_a_solution_from_its_steps(function, combine):
    poisoned = np.where(MASK, SCORES, np.nan)
    np.testing.assert_allclose(function(poisoned, MASK), by_loop(combine), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(function)(poisoned, MASK), by_loop(combine), rtol=1e-6)


def test_a_worse_step_never_helps():
    for function in (process.minimum_over_steps, process.product_over_steps):
        before = np.asarray(function(SCORES, MASK))
        worse = SCORES.copy()
        worse[:, 2] *= 0.1
        assert (np.asarray(function(worse, MASK)) <= before).all()
    # A step more changes the product, not the minimum of equals.
    one, two = jnp.array([[0.5, 0.5]]), jnp.array([[True, False]])
    assert process.product_over_steps(one, jnp.ones((1, 2), bool))[0] == 0.25
    assert process.product_over_steps(one, two)[0] == process.minimum_over_steps(one, two)[0] == 0.5


def test_gains_are_differences_over_real_steps_and_sum_to_the_last_score():
    gains = np.asarray(process.step_gains(np.where(MASK, SCORES, np.nan), MASK))
    for row in range(B):
        before = 0.0
        for step in range(S):
            expected = SCORES[row, step] - before if MASK[row, step] else 0.0
            np.testing.assert_allclose(gains[row, step], expected, atol=1e-6)
            before = SCORES[row, step] if MASK[row, step] else before
    np.testing.assert_allclose(gains.sum(axis=1), process.last_step(SCORES, MASK), atol=1e-6)


def test_rewards_land_on_the_tokens_that_end_steps():
    ends = np.array(
        [[0, 2, 2, 6], [0, 1, 2, 3], [-1, 0, 7, 1], [0, 5, 6, 0], [3, 0, 0, 0], [9, 9, 9, 99]], np.int32
    )
    response = np.ones((B, R), bool)
    response[3, 6:] = False
    expected = np.zeros((B, R))
    for row, step in np.ndindex(B, S):
        column = ends[row, step]
        if MASK[row, step] and 0 <= column < R and response[row, column]:
            expected[row, column] += SCORES[row, step]
    found = jax.jit(process.token_rewards)(np.where(MASK, SCORES, np.nan), MASK, ends, response)
    assert found.dtype == jnp.float32 and found.shape == (B, R)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert expected[0, 2] == pytest.approx(SCORES[0, 1] + SCORES[0, 2]) and not expected[2].any()


def test_step_ends_from_flags_feed_token_rewards():
    flags = RNG.random((B, R)) < 0.4
    flags[0], flags[1] = False, True
    ends, mask = process.find_step_ends(flags)
    for row in range(B):
        found = np.asarray(ends[row])[np.asarray(mask[row])]
        np.testing.assert_array_equal(found, np.flatnonzero(flags[row]))
    placed = process.token_rewards(jnp.ones((B, R)), mask, ends, np.ones((B, R), bool))
    np.testing.assert_array_equal(placed, flags.astype(np.float32))


def test_wrong_types_are_named():
    with pytest.raises(TypeError, match="step_scores must be floating"):
        process.minimum_over_steps(np.ones((2, 2), int), np.ones((2, 2), bool))
    with pytest.raises((TypeError, ValueError), match="step_mask"):
        process.last_step(SCORES, MASK[:, :2])
    with pytest.raises(ValueError, match="step_ends must have shape"):
        process.token_rewards(SCORES, MASK, np.zeros((B, 2), int), np.ones((B, R), bool))
    with pytest.raises(ValueError, match="response_mask must have one entry"):
        process.token_rewards(SCORES, MASK, np.zeros((B, S), int), np.ones((B + 1, R), bool))
    with pytest.raises(TypeError, match="ends_step must be bool"):
        process.find_step_ends(np.ones((2, 2)))


@pytest.mark.parametrize("scale", [True, False])
def test_group_step_advantages_against_loops(scale):
    """Two groups of two rows; row 3 has no step, group 0 three steps in all."""
    rng = np.random.default_rng(7)
    scores = rng.random((4, 5)).astype(np.float32)
    steps = np.array([[0, 1, 0, 1, 0], [0, 0, 1, 0, 0], [1, 1, 0, 0, 1], [0, 0, 0, 0, 0]], bool)
    response = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool)
    expected = np.zeros((4, 5))
    for group in (0, 1):
        rows = (2 * group, 2 * group + 1)
        found = [float(scores[row, t]) for row in rows for t in range(5) if steps[row, t]]
        spread = np.std(found) + 1e-4 if scale else 1.0
        for row in rows:
            for t in range(5):
                later = [s for s in range(t, 5) if steps[row, s]]
                if response[row, t]:
                    expected[row, t] = sum((scores[row, s] - np.mean(found)) / spread for s in later)
    found = process.group_step_advantages(scores, steps, response, group_size=2, scale=scale)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
