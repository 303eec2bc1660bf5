import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models import decoder
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.sampling.best_of_n import repeat_prompts, select_best
from rlhf_jax.sampling.generate import SamplingConfig, generate

CONFIG = ModelConfig(
    vocab_size=19,
    width=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_width=16,
    max_length=32,
)
PROMPTS = np.array([[5, 6, 7], [0, 8, 9], [4, 4, 4]], np.int32)
MASK = np.array([[1, 1, 1], [0, 1, 1], [1, 1, 1]], bool)


@pytest.fixture(scope="module")
def sample():
    params = decoder.init_params(CONFIG, jax.random.key(0))
    sampling = SamplingConfig(max_new_tokens=6, top_k=9)
    run = jax.jit(functools.partial(generate, CONFIG, sampling=sampling, eos_id=3, pad_id=0))
    return lambda tokens, mask, ids: run(params, tokens, mask, jax.random.key(5), row_ids=ids)


def test_samples_of_a_prompt_go_with_it(sample):
    whole = sample(*repeat_prompts(PROMPTS, MASK, 4))
    np.testing.assert_array_equal(whole.tokens[:, :3], np.repeat(PROMPTS, 4, axis=0))
    # Two prompts in another order and company draw what they drew among three.
    part = sample(*repeat_prompts(PROMPTS[[2, 1]], MASK[[2, 1]], 4, prompt_ids=jnp.array([2, 1])))
    rows = [8, 9, 10, 11, 4, 5, 6, 7]
    np.testing.assert_array_equal(part.tokens, whole.tokens[np.array(rows)])
    # The four of a prompt differ.
    assert len(np.unique(np.asarray(whole.tokens)[:4], axis=0)) == 4


def test_the_best_of_each_prompt_is_kept_with_all_that_is_known_of_it(sample):
    rollout = sample(*repeat_prompts(PROMPTS, MASK, 4))
    nan = float("nan")
    scores = jnp.array([0.0, 2.0, 2.0, -1.0, nan, -3.0, -2.0, -9.0, nan, nan, nan, nan])
    best, found = select_best(rollout, scores, 4)
    rows = np.array([1, 6, 8])
    for name in ("tokens", "token_mask", "response_mask", "log_probs", "policy_log_probs", "terminated"):
        np.testing.assert_array_equal(
            getattr(best, name), np.asarray(getattr(rollout, name))[rows], err_msg=name
        )
    assert best.policy_step == rollout.policy_step
    np.testing.assert_array_equal(found, [2.0, -2.0, nan])
    # Even the worst number is better than none.
    impossible = jnp.array([nan, -jnp.inf] * 6)
    np.testing.assert_array_equal(select_best(rollout, impossible, 4)[1], [-jnp.inf] * 3)


def test_what_cannot_be_the_best_of_n(sample):
    rollout = sample(*repeat_prompts(PROMPTS, MASK, 4))
    with pytest.raises(InputError, match="best of 5 was asked for with 12 rows.*give n rows a prompt"):
        select_best(rollout, jnp.zeros(12), 5)
    with pytest.raises(InputError, match=r"scores of shape \[11\]"):
        select_best(rollout, jnp.zeros(11), 4)
    with pytest.raises(InputError, match="best of 0 was asked for: give n of at least 1"):
        repeat_prompts(PROMPTS, MASK, 0)
