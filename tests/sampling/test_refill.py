"""Oracle: ``generate``, which answers all prompts at once."""

import functools

import jax
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models import decoder
from rlhf_jax.models.cache import decode_step
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.sampling.refill import generate_refilled
from rlhf_jax.sampling.stop_strings import stop_table

CONFIG = ModelConfig(
    vocab_size=19,
    width=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_width=24,
    max_length=32,
    window=6,
)
EOS, PROMPTS, WIDTH = 3, 11, 6
TOKENS = np.random.default_rng(0).integers(0, 19, size=(PROMPTS, WIDTH)).astype(np.int32)
MASK = np.arange(WIDTH)[None] >= np.random.default_rng(1).integers(0, WIDTH, size=(PROMPTS, 1))
IDS = np.arange(100, 100 + PROMPTS, dtype=np.int32)
PIECES = [bytes([97 + i]) for i in range(19)]


@pytest.fixture(scope="module")
def params():
    fresh = decoder.init_params(CONFIG, jax.random.key(0))["decoder"]
    return {"decoder": {**fresh, "embedding": 4.0 * fresh["embedding"]}}


def both(params, sampling, *, slots, seed=0, **kwargs):
    arguments = params, TOKENS, MASK, jax.random.key(seed)
    shared = {"sampling": sampling, "eos_id": EOS, "pad_id": 0}
    refilled = jax.jit(functools.partial(generate_refilled, CONFIG, slots=slots, **shared))
    at_once = jax.jit(functools.partial(generate, CONFIG, **shared))
    return [jax.tree.map(np.asarray, run(*arguments, row_ids=IDS, **kwargs)) for run in (refilled, at_once)]


def check_equal(refilled, at_once):
    for name in ("tokens", "token_mask", "response_mask", "terminated", "policy_step"):
        np.testing.assert_array_equal(getattr(refilled, name), getattr(at_once, name), err_msg=name)
    for name in ("log_probs", "policy_log_probs"):
        np.testing.assert_allclose(getattr(refilled, name), getattr(at_once, name), atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("slots", "sampling"),
    [
        (3, SamplingConfig(max_new_tokens=20)),
        (20, SamplingConfig(max_new_tokens=5, top_k=8, min_new_tokens=2)),
        (2, SamplingConfig(max_new_tokens=1)),
    ],
    ids=["queue", "more slots than prompts", "one token"],
)
def test_a_prompt_is_answered_as_in_one_batch(params, slots, sampling):
    refilled, at_once = both(params, sampling, slots=slots, policy_step=7)
    check_equal(refilled, at_once)
    if sampling.max_new_tokens == 20:
        lengths = at_once.response_mask.sum(axis=1)
        assert len(np.unique(lengths)) > 4  # so that slots are not equally far
        assert lengths.max() == 20
        assert 0 < at_once.terminated.sum() < PROMPTS


def test_stop_strings_end_a_response_and_free_its_slot(params):
    # Ids are letters.
    sampling = SamplingConfig(max_new_tokens=20, temperature=3.0)
    table = stop_table(["fg", "h", "qi"], PIECES, vocab_size=19, eos_id=EOS, max_new_tokens=20)
    refilled, at_once = both(params, sampling, slots=2, seed=1, stop_table=table)
    check_equal(refilled, at_once)
    last = at_once.tokens[np.arange(PROMPTS), WIDTH + at_once.response_mask.sum(axis=1) - 1]
    assert (at_once.terminated & (last != EOS)).sum() > 3


def test_no_slot_waits_for_another(params, monkeypatch):
    steps = []

    def counted(*arguments):
        jax.debug.callback(lambda column: steps.append(len(column)), arguments[5])
        return decode_step(*arguments)

    monkeypatch.setattr("rlhf_jax.sampling.refill.decode_step", counted)
    sampling, slots = SamplingConfig(max_new_tokens=20), 3
    refilled, _ = both(params, sampling, slots=slots)
    jax.effects_barrier()
    # A first token comes from the prompt: a response of n tokens keeps a slot for n - 1 steps.
    work = refilled.response_mask.sum(axis=1) - 1
    free = np.zeros(slots, int)
    for kept in work:
        free[free.argmin()] += kept
    assert steps == [slots] * free.max()
    in_batches = sum(work[start : start + slots].max() for start in range(0, PROMPTS, slots))
    assert free.max() < in_batches


def test_a_cache_without_rows_is_refused(params):
    with pytest.raises(InputError, match="slots is 0: give at least 1"):
        both(params, SamplingConfig(max_new_tokens=2), slots=0)
    with pytest.raises(InputError, match="max_new_tokens is 27.*give at most 26"):
        both(params, SamplingConfig(max_new_tokens=27), slots=2)
