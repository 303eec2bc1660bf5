"""Errors that members share, on scores made with errors that are known."""

import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.evaluation.ensemble_errors import shared_errors


def made(share, seed=0):
    """Four members: twice the truth, a zero point, and an error of unit spread of which ``share`` is common to all."""
    rng = np.random.default_rng(seed)
    truth, common = rng.normal(size=(2, 40, 500))
    own = rng.normal(size=(4, 40, 500))
    errors = np.sqrt(share) * common + np.sqrt(1 - share) * own
    return 2 * truth + errors + np.arange(4)[:, None, None] * 10, truth


@pytest.mark.parametrize("share", [0.0, 0.6, 0.9])
def test_the_correlation_is_the_share_that_is_common(share):
    members, truth = made(share)
    found = shared_errors(members, truth, top=500)
    assert found.correlation == pytest.approx(share, abs=0.02)
    assert found.correlation_at_top == pytest.approx(found.correlation) and found.disagreement_at_top == (
        pytest.approx(found.disagreement)
    )


def test_the_top_is_what_the_mean_likes_best():
    """Errors are common at the top alone: where the mean is highest all members are made to say one thing."""
    members, truth = made(0.0)
    members -= members.mean(axis=2, keepdims=True)
    top = np.argsort(-members.mean(axis=0), axis=1)[:, :10]
    for row, best in enumerate(top):
        members[:, row, best] = members[:, row, best].mean(axis=0) + 5.0
    found = shared_errors(members, truth, top=10)
    assert found.correlation_at_top > 0.98 > 0.4 > found.correlation
    assert found.disagreement_at_top < 1e-6 < 0.5 < found.disagreement


@pytest.mark.parametrize(("members", "top"), [(1, 5), (4, 1), (4, 501)])
def test_what_cannot_be_compared_is_refused(members, top):
    scores, truth = made(0.5)
    with pytest.raises(InputError, match="give 2 or more members' scores"):
        shared_errors(scores[:members], truth, top=top)
