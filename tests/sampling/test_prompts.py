import functools

import jax
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models import decoder
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.sampling.prompts import bucket_width, pad_prompts


def test_the_ladder_of_widths():
    ladder = [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    for longest in range(1, 513):
        assert bucket_width(longest, limit=10_000) == min(width for width in ladder if width >= longest)
    # The context may end between two of them.
    assert bucket_width(33, limit=40) == 40
    assert bucket_width(3, limit=7) == 7


def test_prompts_that_do_not_fit():
    with pytest.raises(
        InputError, match="a prompt has 41 tokens and the context has room for 40.*lower max_new"
    ):
        bucket_width(41, limit=40)
    with pytest.raises(InputError, match="has room for 0 beside the response"):
        bucket_width(1, limit=-5)
    with pytest.raises(InputError, match="a prompt has no tokens"):
        bucket_width(0, limit=40)
    with pytest.raises(InputError, match="prompt 1 has 0 tokens: give 1 to 4"):
        pad_prompts([[1], []], width=4, pad_id=0)
    with pytest.raises(InputError, match="prompt 0 has 5 tokens: give 1 to 4"):
        pad_prompts([[1] * 5], width=4, pad_id=0)


def test_padding_is_on_the_left_and_the_mask_comes_from_lengths():
    # Padding that is a token of a prompt too: ids cannot tell.
    tokens, mask = pad_prompts([[7, 9], [9], [1, 2, 9]], width=3, pad_id=9)
    np.testing.assert_array_equal(tokens, [[9, 7, 9], [9, 9, 9], [1, 2, 9]])
    np.testing.assert_array_equal(mask, [[0, 1, 1], [0, 0, 1], [1, 1, 1]])
    assert (tokens.dtype, mask.dtype) == (np.int32, bool)


def test_batches_of_one_bucket_compile_once_and_its_width_changes_no_sample():
    config = ModelConfig(
        vocab_size=19,
        width=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_width=16,
        max_length=64,
    )
    params = decoder.init_params(config, jax.random.key(0))
    sampling = SamplingConfig(max_new_tokens=8, temperature=0.8, top_p=0.9)
    run = jax.jit(functools.partial(generate, config, sampling=sampling, eos_id=3, pad_id=0))
    rng = np.random.default_rng(0)

    def sample(lengths, seed):
        prompts = [rng.integers(4, 19, size=length).tolist() for length in lengths]
        width = bucket_width(max(lengths), limit=config.max_length - 8)
        arrays = pad_prompts(prompts, width=width, pad_id=0)
        return prompts, run(params, *arrays, jax.random.key(seed), row_ids=np.arange(3, dtype=np.int32))

    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: (
            compilations.append(name) if name.endswith("backend_compile_duration") else None
        )
    )
    sample([17, 4, 20], 0)
    assert compilations  # else what follows says nothing
    compilations.clear()
    prompts, rollout = sample([2, 24, 9], 1)
    sample([18, 18, 18], 2)
    assert not compilations
    wider = run(
        params,
        *pad_prompts(prompts, width=32, pad_id=0),
        jax.random.key(1),
        row_ids=np.arange(3, dtype=np.int32),
    )
    assert compilations
    np.testing.assert_array_equal(wider.tokens[:, -8:], rollout.tokens[:, -8:])
    assert len(np.unique(np.asarray(rollout.tokens)[:, -8:])) > 5
