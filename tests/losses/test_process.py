"""The per-step loss: by hand, for every kind of label."""

import numpy as np
import pytest

from rlhf_jax import losses

LOGITS, MASK = np.array([[0.0, 1.0, -1.0, 5.0]], np.float32), np.array([[True, True, True, False]])
EXPECTED = [[np.log(2), np.log1p(np.exp(1.0)), np.log1p(np.exp(1.0)), 0.0]]


@pytest.mark.parametrize("dtype", [bool, np.int32, np.float32])
def test_by_hand(dtype):
    labels = np.array([[1, 0, 1, 1]]).astype(dtype)
    np.testing.assert_allclose(losses.process_reward_loss(LOGITS, labels, MASK), EXPECTED, rtol=1e-6)


def test_soft_labels_mix():
    """A step whose continuations were right a quarter of the time."""
    soft = losses.process_reward_loss(LOGITS, np.full((1, 4), 0.25, np.float32), MASK)
    right = losses.process_reward_loss(LOGITS, np.ones((1, 4), bool), MASK)
    wrong = losses.process_reward_loss(LOGITS, np.zeros((1, 4), bool), MASK)
    np.testing.assert_allclose(soft, 0.25 * right + 0.75 * wrong, rtol=1e-6)
