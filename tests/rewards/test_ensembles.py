"""Ensembles: stacked members are the members, aggregates against loops, and an alarm that rings when it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models import decoder, heads
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.rewards import ensembles, reward_model
from rlhf_jax.types import DemonstrationBatch

CONFIG = ModelConfig(
    vocab_size=11, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=16, max_length=8
)
SCORES = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32)


@pytest.fixture(scope="module")
def batch():
    mask = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]], bool)
    tokens = np.random.default_rng(1).integers(0, 11, mask.shape)
    return DemonstrationBatch(
        tokens=jnp.asarray(tokens), token_mask=jnp.asarray(mask), response_mask=jnp.asarray(mask[:, 3:])
    )


@pytest.fixture(scope="module")
def shared():
    return decoder.init_params(CONFIG, jax.random.key(0))["decoder"]


def test_a_stack_scores_as_each_of_its_members(batch, shared):
    members = [
        {
            "decoder": jax.tree.map(lambda x, scale=scale: scale * x, shared),
            "head": heads.init_scalar_head(CONFIG, jax.random.key(10)),
        }
        for scale in (1.0, 0.5, -1.5)
    ]
    stacked = ensembles.stack_members(members)
    offsets = jnp.array([0.5, -1.0, 2.0])
    found = jax.jit(lambda params, batch: ensembles.score(CONFIG, params, batch, offsets=offsets))(
        stacked, batch
    )
    alone = jax.jit(lambda params, batch: reward_model.score(CONFIG, params, batch))
    expected = [alone(m, batch) - o for m, o in zip(members, offsets, strict=True)]
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-5)
    assert np.abs(np.diff(found + offsets[:, None], axis=0)).min() > 1e-3  # they are not one model
    for index, one in enumerate(members):
        same = jax.tree.map(lambda a, b: bool((a == b).all()), ensembles.member(stacked, index), one)
        assert all(jax.tree.leaves(same))


def test_members_begin_with_one_decoder_and_heads_of_their_own(shared):
    params = ensembles.init_ensemble(CONFIG, [shared], jax.random.key(7), size=64)
    assert jax.tree.structure(params["decoder"]) == jax.tree.structure(shared)
    for stacked, one in zip(jax.tree.leaves(params["decoder"]), jax.tree.leaves(shared), strict=True):
        np.testing.assert_array_equal(stacked, np.broadcast_to(one, (64, *one.shape)))
    kernel = np.asarray(params["head"]["kernel"])
    assert kernel.shape == (64, CONFIG.width) and not np.asarray(params["head"]["bias"]).any()
    np.testing.assert_allclose(kernel.std(), (CONFIG.width + 1) ** -0.5, rtol=0.1)
    correlations = np.corrcoef(kernel)
    assert np.abs(correlations[np.triu_indices(64, 1)]).max() < 0.95  # no two heads are the same draw


def test_members_may_begin_with_a_decoder_each(shared):
    decoders = [jax.tree.map(lambda x, scale=scale: x * scale, shared) for scale in (1.0, 2.0, 3.0)]
    params = ensembles.init_ensemble(CONFIG, decoders, jax.random.key(7), size=3)
    for number, one in enumerate(decoders):
        jax.tree.map(np.testing.assert_array_equal, ensembles.member(params, number)["decoder"], one)
    with pytest.raises(ValueError, match="3 decoders for 4 members: give one, or one for each"):
        ensembles.init_ensemble(CONFIG, decoders, jax.random.key(7), size=4)


def test_aggregates_are_what_loops_say():
    columns = [[float(x) for x in column] for column in SCORES.T]
    means = [sum(column) / 4 for column in columns]
    variances = [sum((x - m) ** 2 for x in column) / 4 for column, m in zip(columns, means, strict=True)]
    np.testing.assert_allclose(ensembles.mean_score(SCORES), means, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(ensembles.worst_case_score(SCORES), [min(c) for c in columns], rtol=1e-6)
    np.testing.assert_allclose(
        jax.jit(lambda x: ensembles.mean_minus_variance(x, penalty=0.7))(SCORES),
        [m - 0.7 * v for m, v in zip(means, variances, strict=True)],
        rtol=1e-5,
        atol=1e-6,
    )
    np.testing.assert_allclose(ensembles.disagreement(SCORES), np.sqrt(variances), rtol=1e-5)


def test_one_member_is_its_own_ensemble():
    one = SCORES[:1]
    for aggregate in (
        ensembles.mean_score(one),
        ensembles.worst_case_score(one),
        ensembles.mean_minus_variance(one, penalty=5.0),
    ):
        np.testing.assert_array_equal(aggregate, one[0])


def test_conservative_aggregates_prefer_what_members_agree_on():
    scores = np.array([[1.0, 3.0], [1.0, -0.5]], np.float32)
    assert ensembles.mean_score(scores).argmax() == 1
    assert ensembles.worst_case_score(scores).argmax() == 0
    assert ensembles.mean_minus_variance(scores, penalty=0.5).argmax() == 0
    with pytest.raises(ValueError, match="penalty must be 0 or above"):
        ensembles.mean_minus_variance(scores, penalty=-1.0)


def members_on(rng, rows, disagreement):
    """Rewards that members with different zero points give: what they share, and what each believes alone."""
    zero_points = np.array([[3.0], [-2.0], [0.5], [10.0]])
    return zero_points + rng.normal(size=(1, rows)) + disagreement * rng.normal(size=(4, rows))


def test_the_alarm_is_calibrated_and_rings_only_beyond_chance():
    rng = np.random.default_rng(2)
    alarm = ensembles.calibrate_alarm(members_on(rng, 2000, 0.3))
    assert alarm.expected_share == pytest.approx(0.05, abs=1e-3)
    np.testing.assert_allclose(alarm.offsets, [3.0, -2.0, 0.5, 10.0], atol=0.1)
    fresh = members_on(rng, 50_000, 0.3)
    # Standard error of the threshold's share: sqrt(0.05 * 0.95 / 2000) = 0.005.
    assert ensembles.share_above(alarm, fresh) == pytest.approx(0.05, abs=0.015)
    quiet = [ensembles.is_raised(alarm, fresh[:, i : i + 64]) for i in range(0, 50_000 - 64, 64)]
    assert np.mean(quiet) < 0.005
    assert ensembles.is_raised(alarm, members_on(rng, 64, 0.6))
    # A shift that all members share is no disagreement.
    assert not ensembles.is_raised(alarm, members_on(rng, 64, 0.3) + 100.0)


@pytest.mark.parametrize(
    ("scores", "share", "message"),
    [
        (np.zeros((1, 200)), 0.05, "at least 2 members"),
        (np.zeros(200), 0.05, "at least 2 members"),
        (np.zeros((2, 50)), 0.05, "at least 100 rows"),
        (np.zeros((2, 200)), 0.7, "share is 0.7"),
        (np.where(np.arange(400).reshape(2, 200) == 207, np.nan, 0.0), 0.05, "row 7 by member 1 is nan"),
    ],
)
def test_what_cannot_calibrate_an_alarm_is_refused(scores, share, message):
    with pytest.raises(InputError, match=message):
        ensembles.calibrate_alarm(scores, share=share)


def test_an_alarm_is_of_one_ensemble():
    alarm = ensembles.calibrate_alarm(members_on(np.random.default_rng(0), 200, 1.0))
    with pytest.raises(InputError, match="4 members and got 2"):
        ensembles.share_above(alarm, np.zeros((2, 8)))
