import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from rlhf_jax.errors import InputError
from rlhf_jax.losses import token_log_probs
from rlhf_jax.models import decoder
from rlhf_jax.models.cache import decode_step
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.huggingface import from_pretrained
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.sampling.logits import behaviour_log_probs

CONFIG = ModelConfig(
    vocab_size=19,
    width=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_width=24,
    max_length=32,
    tied_embeddings=False,
)
PROMPTS = np.random.default_rng(0).integers(0, 19, size=(4, 6)).astype(np.int32)
MASK = np.arange(6)[None] >= np.array([[0], [2], [5], [3]])
NEW = 10
EOS = 3
PLAIN = SamplingConfig(max_new_tokens=NEW)

jitted = jax.jit(generate, static_argnums=0, static_argnames=("sampling", "eos_id", "pad_id"))
logits_of = jax.jit(decoder.logits, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    fresh = decoder.init_params(CONFIG, jax.random.key(0))["decoder"]
    return {"decoder": {**fresh, "unembedding": 25.0 * fresh["unembedding"]}}


@pytest.fixture(scope="module")
def sample(params):
    def call(sampling=PLAIN, *, prompts=PROMPTS, mask=MASK, seed=0, eos_id=EOS, pad_id=0, **kwargs):
        key = jax.random.key(seed)
        rollout = jitted(
            CONFIG, params, prompts, mask, key, sampling=sampling, eos_id=eos_id, pad_id=pad_id, **kwargs
        )
        return jax.tree.map(np.asarray, rollout)

    return call


def response_logits(params, rollout, new=NEW):
    """Teacher-forced logits of the response columns."""
    logits = logits_of(CONFIG, params, rollout.tokens, rollout.token_mask)
    return logits[:, -new - 1 : -1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"greedy": True, "temperature": 0.7},
        {"top_k": 8, "temperature": 1.3},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"min_new_tokens": 5},
        {"temperature": 1.3, "top_k": 8, "top_p": 0.8, "min_p": 0.05, "min_new_tokens": 2},
        {"temperature": 0.7, "top_k": 5, "greedy": True, "cache_dtype": "float32"},
    ],
    ids=str,
)
def test_both_log_probs_equal_teacher_forcing(params, sample, options):
    rollout = sample(SamplingConfig(max_new_tokens=NEW, **options))
    logits = np.asarray(response_logits(params, rollout))
    chosen, mask = rollout.tokens[:, -NEW:], rollout.response_mask
    temperature = options.get("temperature", 1.0)
    full = np.asarray(token_log_probs(logits, chosen, temperature=temperature))
    logits = logits.copy()
    logits[:, : options.get("min_new_tokens", 0), EOS] = -np.inf
    cuts = {name: options[name] for name in ("top_k", "top_p", "min_p") if name in options}
    allowed = behaviour_log_probs(jnp.asarray(logits), temperature=temperature, **cuts)
    forced = np.take_along_axis(np.asarray(allowed), chosen[..., None], axis=2)[..., 0]
    assert mask.sum() > 20
    np.testing.assert_allclose(rollout.log_probs[mask], forced[mask], atol=1e-5, rtol=0)
    np.testing.assert_allclose(rollout.policy_log_probs[mask], full[mask], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(rollout.policy_log_probs[~mask], 0.0)
    if cuts:
        assert np.mean(rollout.log_probs[mask] - rollout.policy_log_probs[mask]) > 0.01
    elif "min_new_tokens" not in options:
        np.testing.assert_array_equal(rollout.log_probs, rollout.policy_log_probs)


def test_greedy_takes_the_most_probable_token_every_time(params, sample):
    rollout = sample(dataclasses.replace(PLAIN, greedy=True), eos_id=-1)
    best = np.argmax(response_logits(params, rollout), axis=-1)
    np.testing.assert_array_equal(rollout.tokens[:, -NEW:], best)
    assert len(np.unique(best)) > 3


def test_a_row_ends_with_eos_and_then_holds_padding(sample):
    # Padding that is EOS itself: only lengths can tell the two apart.
    ended = cut = 0
    for seed in range(3):
        rollout = sample(seed=seed, pad_id=EOS)
        responses = rollout.tokens[:, -NEW:]
        for row in range(4):
            hits = np.flatnonzero(responses[row] == EOS)
            length = hits[0] + 1 if hits.size else NEW
            np.testing.assert_array_equal(rollout.response_mask[row], np.arange(NEW) < length)
            np.testing.assert_array_equal(responses[row, length:], EOS)
            np.testing.assert_array_equal(rollout.log_probs[row, length:], 0.0)
            assert (rollout.log_probs[row, :length] < 0).all()
            assert rollout.terminated[row] == bool(hits.size)
            ended, cut = ended + bool(hits.size), cut + (not hits.size)
        np.testing.assert_array_equal(rollout.token_mask[:, -NEW:], rollout.response_mask)
        np.testing.assert_array_equal(rollout.tokens[:, :6], PROMPTS)
        np.testing.assert_array_equal(rollout.token_mask[:, :6], MASK)
    assert ended
    assert cut


def test_decoding_stops_with_the_last_row(params, monkeypatch):
    steps = []

    def counted(*arguments):
        jax.debug.callback(lambda column: steps.append(int(column)), arguments[5])
        return decode_step(*arguments)

    monkeypatch.setattr("rlhf_jax.sampling.generate.decode_step", counted)
    sampling = SamplingConfig(max_new_tokens=26, temperature=2.0)
    run = jax.jit(functools.partial(generate, CONFIG, sampling=sampling, eos_id=EOS, pad_id=0))
    seen = set()
    for seed in range(4):
        steps.clear()
        rollout = run(params, PROMPTS[:1], MASK[:1], jax.random.key(seed))
        length = int(np.asarray(rollout.response_mask).sum())
        jax.effects_barrier()
        # The first token comes from the prompt, and the last one is not read.
        assert sorted(steps) == list(range(6, 6 + length - 1))
        seen.add(length)
    assert min(seen) < 26
    assert len(seen) > 1


def test_another_padding_id_changes_the_filling_alone(sample):
    one, other = sample(pad_id=EOS), sample(pad_id=0)
    np.testing.assert_array_equal(one.response_mask, other.response_mask)
    np.testing.assert_array_equal(one.log_probs, other.log_probs)
    mask = one.response_mask
    np.testing.assert_array_equal(one.tokens[:, -NEW:][mask], other.tokens[:, -NEW:][mask])
    np.testing.assert_array_equal(other.tokens[:, -NEW:][~mask], 0)


def test_eos_waits_for_min_new_tokens(params):
    # EOS is nearly certain: without the minimum every response is EOS alone.
    decoder_params = params["decoder"]
    hidden = decoder.hidden_states(CONFIG, params, PROMPTS, MASK)[:, -1]
    direction = jnp.mean(hidden, axis=0)
    eager = {
        "decoder": {
            **decoder_params,
            "unembedding": decoder_params["unembedding"].at[EOS].set(40.0 * direction),
        }
    }
    sampling = SamplingConfig(max_new_tokens=NEW, min_new_tokens=4)
    rollout = jax.jit(functools.partial(generate, CONFIG, sampling=sampling, eos_id=EOS, pad_id=0))(
        eager, PROMPTS, MASK, jax.random.key(0)
    )
    assert not (np.asarray(rollout.tokens)[:, 6:10] == EOS).any()
    assert (np.asarray(rollout.response_mask).sum(axis=1) > 4).all()
    assert (np.asarray(rollout.tokens)[:, 6:] == EOS).any()
    assert np.isfinite(rollout.log_probs).all()


def test_a_row_depends_on_its_own_prompt_and_key_alone(sample):
    alone = sample()
    prompts, mask = PROMPTS.copy(), MASK.copy()
    prompts[[0, 1, 3]] = (prompts[[0, 1, 3]] + 5) % 19
    mask[[0, 1, 3]] = np.arange(6) >= 1
    neighbours = sample(prompts=prompts, mask=mask)
    np.testing.assert_array_equal(neighbours.tokens[2], alone.tokens[2])
    np.testing.assert_array_equal(neighbours.log_probs[2], alone.log_probs[2])
    assert not np.array_equal(neighbours.tokens[0, -NEW:], alone.tokens[0, -NEW:])

    # The same prompts behind three more columns of padding, whatever those hold.
    wide = np.concatenate([np.full((4, 3), 11, np.int32), PROMPTS], axis=1)
    padded = sample(prompts=wide, mask=np.pad(MASK, ((0, 0), (3, 0))))
    np.testing.assert_array_equal(padded.tokens[:, -NEW:], alone.tokens[:, -NEW:])
    np.testing.assert_allclose(padded.log_probs, alone.log_probs, atol=1e-5, rtol=0)


def test_a_row_takes_its_number_with_it(sample):
    alone = sample(row_ids=np.array([7, 8, 9, 10], np.int32))
    order = np.array([2, 0, 3, 1])
    moved = sample(prompts=PROMPTS[order], mask=MASK[order], row_ids=np.array([7, 8, 9, 10], np.int32)[order])
    np.testing.assert_array_equal(moved.tokens, alone.tokens[order])
    np.testing.assert_array_equal(moved.log_probs, alone.log_probs[order])
    first = sample(row_ids=np.arange(4, dtype=np.int32))
    np.testing.assert_array_equal(first.tokens, sample().tokens)
    assert not np.array_equal(first.tokens, alone.tokens)


def test_keys_decide_and_rows_with_equal_prompts_differ(sample):
    same = np.repeat(PROMPTS[:1], 4, axis=0)
    full = np.ones((4, 6), bool)
    first, again, other = (sample(prompts=same, mask=full, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert not np.array_equal(first.tokens, other.tokens)
    assert len(np.unique(first.tokens, axis=0)) == 4


def test_first_and_second_tokens_follow_the_model(params):
    rows = 6000
    prompts, mask = np.repeat(PROMPTS[:1], rows, axis=0), np.ones((rows, 6), bool)
    rollout = jitted(
        CONFIG,
        params,
        prompts,
        mask,
        jax.random.key(11),
        sampling=SamplingConfig(max_new_tokens=2),
        eos_id=-1,
        pad_id=0,
    )
    drawn = np.asarray(rollout.tokens)[:, -2:]
    prefixes = np.concatenate([np.repeat(PROMPTS[:1], 19, axis=0), np.arange(19)[:, None]], axis=1)
    log_probs = np.asarray(
        jax.nn.log_softmax(logits_of(CONFIG, params, prefixes, np.ones(prefixes.shape, bool))), np.float64
    )
    first, second = np.exp(log_probs[0, 5]), np.exp(log_probs[:, 6])
    joint = (first[:, None] * second).ravel()
    counts = np.bincount(drawn[:, 0] * 19 + drawn[:, 1], minlength=361)
    usual = joint * rows >= 5
    observed = np.append(counts[usual], counts[~usual].sum())
    expected = np.append(joint[usual], joint[~usual].sum()) * rows
    assert usual.sum() > 50
    assert scipy.stats.chisquare(observed, expected * (rows / expected.sum())).pvalue > 1e-3


def test_one_compilation_serves_a_bucket(sample):
    sample()
    compiled = jitted._cache_size()
    for seed in (4, 5):
        rollout = sample(
            prompts=(PROMPTS + seed) % 19, mask=np.roll(MASK, 1, axis=0), seed=seed, policy_step=0
        )
    sample(policy_step=np.int32(3))
    grown = jitted._cache_size()
    rollout = sample(policy_step=np.int32(8))
    assert rollout.policy_step == 8
    assert jitted._cache_size() == grown
    # ``policy_step`` given or left out, Python int or array, are at most one more entry each.
    assert grown <= compiled + 2


def test_bfloat16_log_probs_stay_near_teacher_forcing(params):
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    run = jax.jit(functools.partial(generate, config, sampling=PLAIN, eos_id=EOS, pad_id=0))
    rollout = run(params, PROMPTS, MASK, jax.random.key(0))
    logits = logits_of(config, params, rollout.tokens, rollout.token_mask)[:, -NEW - 1 : -1]
    forced = token_log_probs(logits, rollout.tokens[:, -NEW:])
    mask = np.asarray(rollout.response_mask)
    np.testing.assert_allclose(np.asarray(rollout.log_probs)[mask], np.asarray(forced)[mask], atol=0.1)


def test_the_real_checkpoint_tells_its_story(shared_data):
    transformers = pytest.importorskip("transformers")
    folder = shared_data / "models" / "stories260K"
    config, params = from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sampling = SamplingConfig(max_new_tokens=200, greedy=True)
    run = jax.jit(functools.partial(generate, config, sampling=sampling, eos_id=2, pad_id=2))
    rollout = run(params, jnp.array([[1]]), jnp.array([[True]]), jax.random.key(0))
    expected = json.loads((folder / "expected.json").read_text())["greedy_from_bos_200_tokens"]
    assert tokenizer.decode(np.asarray(rollout.tokens)[0, 1:]) == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("cache_dtype", "float16"),
        ("min_new_tokens", 11),
    ],
)
def test_a_field_out_of_range_is_named_with_its_value(field, value):
    with pytest.raises(InputError) as error:
        dataclasses.replace(PLAIN, **{field: value})
    assert field in str(error.value)
    assert str(value) in str(error.value)


def test_more_tokens_than_the_context_holds(params):
    with pytest.raises(InputError, match="max_new_tokens is 27.*max_length 32.*at most 26"):
        generate(
            CONFIG,
            params,
            PROMPTS,
            MASK,
            jax.random.key(0),
            sampling=SamplingConfig(max_new_tokens=27),
            eos_id=EOS,
            pad_id=0,
        )
