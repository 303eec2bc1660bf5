"""Encoded rows and their batches: layout, truncation, epochs, and resuming in the middle of one."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data import batches as b
from rlhf_jax.data import tokenizer as tk
from rlhf_jax.data.rows import Demonstration, Preference, Prompt
from rlhf_jax.data.world import WorldConfig, demonstrations, preferences, prompts, world_tokenizer
from rlhf_jax.errors import InputError
from rlhf_jax.types import DemonstrationBatch, PreferenceBatch

P, R = 16, 48
WORLD = WorldConfig(seed=3, num_demonstrations=37, num_preferences=29, num_prompts=23)


@pytest.fixture(scope="module")
def tokenizer():
    return world_tokenizer()


@pytest.fixture(scope="module")
def encoded(tokenizer):
    """The three kinds of encoded rows, with the function that batches each."""
    lengths = {"prompt_length": P, "response_length": R}
    return {
        "demonstrations": (
            b.encode_demonstrations(demonstrations(WORLD), tokenizer, **lengths)[0],
            b.demonstration_batches,
        ),
        "preferences": (
            b.encode_preferences(preferences(WORLD, "train"), tokenizer, **lengths)[0],
            b.preference_batches,
        ),
        "prompts": (
            b.encode_prompts(prompts(WORLD, "train"), tokenizer, prompt_length=P)[0],
            b.prompt_batches,
        ),
    }


KINDS = ("demonstrations", "preferences", "prompts")


def _same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, c in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert type(a) is type(c) is np.ndarray
        assert a.dtype == c.dtype
        np.testing.assert_array_equal(a, c)


def _expected_side(tokenizer, prompt, response):
    """One row, column by column: what types.py promises, spelt out."""
    words = ["<s>", *prompt.split()]
    said = [*response.split(), "</s>"]
    tokens, mask, response_mask = [], [], []
    for column in range(P + R):
        if column < P:
            position = column - (P - len(words))
            word = words[position] if position >= 0 else None
        else:
            word = said[column - P] if column - P < len(said) else None
            response_mask.append(word is not None)
        tokens.append(tokenizer.get_vocab()[word or "<pad>"])
        mask.append(word is not None)
    return tokens, mask, response_mask


def test_layout_of_demonstrations(tokenizer, encoded):
    batch, row_mask = next(b.eval_batches(encoded["demonstrations"][0], 37))
    assert isinstance(batch, DemonstrationBatch)
    assert (batch.tokens.dtype, batch.token_mask.dtype, batch.response_mask.dtype) == (np.int32, bool, bool)
    assert row_mask.all()
    for i, row in enumerate(demonstrations(WORLD)):
        tokens, mask, response_mask = _expected_side(tokenizer, row.prompt, row.response)
        assert batch.tokens[i].tolist() == tokens
        assert batch.token_mask[i].tolist() == mask
        assert batch.response_mask[i].tolist() == response_mask


def test_layout_of_preferences(tokenizer, encoded):
    batch, _ = next(b.eval_batches(encoded["preferences"][0], 29))
    assert isinstance(batch, PreferenceBatch)
    for i, row in enumerate(preferences(WORLD, "train")):
        for side, response in ((batch.chosen, row.chosen), (batch.rejected, row.rejected)):
            tokens, mask, response_mask = _expected_side(tokenizer, row.prompt, response)
            assert side.tokens[i].tolist() == tokens
            assert side.token_mask[i].tolist() == mask
            assert side.response_mask[i].tolist() == response_mask


def test_layout_of_prompts(tokenizer, encoded):
    rows, _ = encoded["prompts"]
    batch = next(b.prompt_batches(rows, batch_size=5, seed=0))
    assert set(batch) == {"tokens", "token_mask", "index"}
    for tokens, mask, index in zip(batch["tokens"], batch["token_mask"], batch["index"], strict=True):
        prompt = rows.rows[index].row.prompt
        assert tokens[mask].tolist() == [1, *tokenizer.encode(prompt, add_special_tokens=False)]
        assert mask.tolist() == [False] * (P - mask.sum()) + [True] * mask.sum()
        assert tokens.shape == (P,)


def test_with_pad_equal_to_eos_the_eos_is_still_learned(tokenizer):
    same = world_tokenizer()
    same.pad_token = same.eos_token
    rows = demonstrations(WORLD)[:4]
    batch, _ = next(
        b.eval_batches(b.encode_demonstrations(rows, same, prompt_length=P, response_length=R)[0], 4)
    )
    for i, row in enumerate(rows):
        length = len(row.response.split()) + 1
        assert batch.tokens[i, P + length - 1] == same.eos_token_id
        assert batch.response_mask[i].sum() == length
        assert (batch.tokens[i, P + length :] == same.eos_token_id).all()


def _demonstration(prompt_words, response_words, source="f.jsonl:7"):
    words = ["bold", "warm", "clever", "fresh", "great", "dull", "weak", "flat", "stale", "cheap"]
    return Demonstration(
        prompt=" ".join(words[:prompt_words]), response=" ".join(words[:response_words]), source=source
    )


def test_a_row_that_just_fits_is_kept_whole(tokenizer):
    # With BOS and EOS: 4 and 3 tokens.
    rows, report = b.encode_demonstrations(
        [_demonstration(3, 2)], tokenizer, prompt_length=4, response_length=3
    )
    assert report == b.EncodeReport(kept=1)
    assert (len(rows.rows[0].prompt_ids), len(rows.rows[0].response_ids)) == (4, 3)


@pytest.mark.parametrize(
    ("prompt_words", "response_words", "message"),
    [
        (
            4,
            2,
            "f.jsonl:7 has a prompt of 5 tokens where prompt_length is 4: raise --config.data.prompt_length",
        ),
        (3, 3, "f.jsonl:7 has a response of 4 tokens \\(EOS included\\) where response_length is 3: raise"),
        (9, 9, "a prompt of 10 tokens where prompt_length is 4 and a response of 10 tokens"),
    ],
)
def test_too_long_is_an_error_that_names_row_lengths_and_remedies(
    tokenizer, prompt_words, response_words, message
):
    rows = [_demonstration(1, 1), _demonstration(prompt_words, response_words)]
    with pytest.raises(InputError, match=message) as error:
        b.encode_demonstrations(rows, tokenizer, prompt_length=4, response_length=3)
    assert "--config.data.truncation=drop, keep_start or keep_end" in str(error.value)


@pytest.mark.parametrize(
    ("truncation", "prompt", "response"),
    [
        ("keep_start", "<s> bold warm clever", "bold warm clever"),
        ("keep_end", "<s> great dull weak", "bold warm clever"),
    ],
)
def test_truncation_keeps_bos_and_loses_eos(tokenizer, truncation, prompt, response):
    rows, report = b.encode_demonstrations(
        [_demonstration(7, 5), _demonstration(3, 2)],
        tokenizer,
        prompt_length=4,
        response_length=3,
        truncation=truncation,
    )
    first, second = rows.rows
    assert tokenizer.convert_ids_to_tokens(first.prompt_ids) == prompt.split()
    assert tokenizer.convert_ids_to_tokens(first.response_ids) == response.split()
    assert tokenizer.convert_ids_to_tokens(second.response_ids) == ["bold", "warm", "</s>"]
    assert report.kept == 2
    assert report.dropped == ()
    [(source, reason)] = report.truncated
    assert source == "f.jsonl:7"
    assert reason.startswith("has a prompt of 8 tokens where prompt_length is 4 and a response of 6 tokens")
    batch, _ = next(b.eval_batches(rows, 2))
    assert batch.response_mask.tolist() == [[True, True, True], [True, True, True]]


def test_keep_end_without_bos_keeps_the_last_tokens(tokenizer):
    bare = world_tokenizer()
    bare.bos_token = None
    rows, _ = b.encode_prompts(
        [Prompt(prompt="bold warm clever fresh", source="s")], bare, prompt_length=2, truncation="keep_end"
    )
    assert bare.convert_ids_to_tokens(rows.rows[0].prompt_ids) == ["clever", "fresh"]


def test_drop_counts_and_names_what_it_left_out(tokenizer):
    rows = [_demonstration(1, 1, "a:1"), _demonstration(9, 1, "a:2"), _demonstration(1, 9, "a:3")]
    kept, report = b.encode_demonstrations(
        rows, tokenizer, prompt_length=4, response_length=3, truncation="drop"
    )
    assert [row.row.source for row in kept.rows] == ["a:1"]
    assert report.kept == 1
    assert [source for source, _ in report.dropped] == ["a:2", "a:3"]
    assert "prompt of 10 tokens" in report.dropped[0][1]
    assert "response of 10 tokens" in report.dropped[1][1]
    with pytest.raises(
        InputError, match="all 2 rows were dropped, the first \\(a:2\\) because it has a prompt of 10"
    ):
        b.encode_demonstrations(rows[1:], tokenizer, prompt_length=4, response_length=3, truncation="drop")


def test_a_pair_that_is_equal_once_cut_says_nothing(tokenizer):
    pair = Preference(prompt="bold", chosen="warm clever fresh", rejected="warm clever great", source="a:1")
    other = dataclasses.replace(pair, rejected="dull", source="a:2")
    kept, report = b.encode_preferences(
        [pair, other], tokenizer, prompt_length=4, response_length=2, truncation="keep_start"
    )
    assert [row.row.source for row in kept.rows] == ["a:2"]
    assert report.dropped == (("a:1", "has two responses of the same tokens, as far as they are kept"),)
    assert [source for source, _ in report.truncated] == ["a:2"]
    unknown = dataclasses.replace(pair, chosen="zebra", rejected="gnu", source="a:3")
    with pytest.raises(InputError, match="a:3 has two responses of the same tokens: give a tokenizer"):
        b.encode_preferences([unknown], tokenizer, prompt_length=4, response_length=2)
    # The longer side of a pair is enough to make it too long.
    with pytest.raises(InputError, match="a:2 has a response of 4 tokens"):
        b.encode_preferences([other], tokenizer, prompt_length=4, response_length=2)


def test_what_cannot_be_encoded(tokenizer):
    row = _demonstration(1, 1)
    with pytest.raises(InputError, match="truncation is 'cut': use one of error, drop, keep_start, keep_end"):
        b.encode_demonstrations([row], tokenizer, prompt_length=4, response_length=3, truncation="cut")
    with pytest.raises(InputError, match="prompt_length is 1 and response_length 3"):
        b.encode_demonstrations([row], tokenizer, prompt_length=1, response_length=3)
    with pytest.raises(InputError, match="prompt_length is 4 and response_length 0"):
        b.encode_demonstrations([row], tokenizer, prompt_length=4, response_length=0)
    bare = world_tokenizer()
    bare.bos_token = None
    with pytest.raises(InputError, match="a:1 has no prompt token to respond to"):
        b.encode_prompts([Prompt(prompt="", source="a:1")], bare, prompt_length=4)


def _rows_of(batch):
    """A key for each row of a batch, whatever its kind: the bytes of all its leaves."""
    return [tuple(leaf[i].tobytes() for leaf in jax.tree.leaves(batch)) for i in range(_size(batch))]


def _size(batch):
    return len(jax.tree.leaves(batch)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_every_epoch_shows_every_row_once_in_a_new_order(encoded, kind):
    rows, batches_of = encoded[kind]
    count = len(rows)
    iterator = batches_of(rows, batch_size=5, seed=1)
    seen = [key for _ in range(count) for key in _rows_of(next(iterator))]
    epochs = [seen[start : start + count] for start in range(0, 5 * count, count)]
    everything = sorted(key for batch, _ in b.eval_batches(rows, count) for key in _rows_of(batch))
    for epoch in epochs:
        assert sorted(epoch) == everything
    assert len({tuple(epoch) for epoch in epochs}) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_order_depends_on_the_seed_alone(encoded, kind):
    rows, batches_of = encoded[kind]
    first, again, other = (batches_of(rows, batch_size=8, seed=seed) for seed in (1, 1, 2))
    for _ in range(4):
        batch = next(first)
        _same(batch, next(again))
        assert _rows_of(batch) != _rows_of(next(other))


@pytest.mark.parametrize("kind", KINDS)
def test_resume_at_random_points_gives_the_identical_next_batches(encoded, kind):
    rows, batches_of = encoded[kind]
    rng = np.random.default_rng(5)
    for batch_size in (1, 4, 64):  # 64 rows are more than an epoch
        stop = int(rng.integers(0, 40))
        iterator = batches_of(rows, batch_size=batch_size, seed=9)
        for _ in range(stop):
            next(iterator)
        state = iterator.get_state()
        ahead = [next(iterator) for _ in range(12)]
        resumed = batches_of(rows, batch_size=batch_size, seed=9)
        resumed.set_state(state)
        # Also back in time, on the iterator that went ahead.
        iterator.set_state(state)
        for batch in ahead:
            _same(next(resumed), batch)
            _same(next(iterator), batch)


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(KINDS), batch_size=st.integers(1, 50))
def test_evaluation_drops_nothing_and_invents_nothing(encoded, kind, batch_size):
    rows, _ = encoded[kind]
    kept = []
    for batch, row_mask in b.eval_batches(rows, batch_size):
        assert _size(batch) == len(row_mask) == batch_size
        kept += [key for key, real in zip(_rows_of(batch), row_mask, strict=True) if real]
        assert row_mask.tolist() == sorted(row_mask.tolist(), reverse=True)
    [(whole, _)] = b.eval_batches(rows, len(rows))
    assert kept == _rows_of(whole)
    assert len(kept) == len(rows)


def test_no_batches_of_nothing(encoded, tokenizer):
    rows, _ = encoded["prompts"]
    with pytest.raises(InputError, match="23 rows in batches of 0"):
        b.prompt_batches(rows, batch_size=0, seed=0)
    with pytest.raises(InputError, match="0 rows in batches of 4"):
        b.prompt_batches(dataclasses.replace(rows, rows=()), batch_size=4, seed=0)
    with pytest.raises(InputError, match="the data seed is -1"):
        b.prompt_batches(rows, batch_size=4, seed=-1)
    with pytest.raises(InputError, match="batch size of 0"):
        next(b.eval_batches(rows, 0))
    assert list(b.eval_batches(dataclasses.replace(rows, rows=()), 4)) == []


def test_boundaries_may_differ_between_the_sides_of_a_pair(tokenizer):
    # In some tokenizers a prompt's last blank joins the first token of one response and not of the other:
    # each side then has its own prompt ids, and both are laid out against the same columns.
    rows = b.Encoded(
        rows=(
            b.EncodedPreference(
                chosen_prompt_ids=(1, 5, 6),
                chosen_ids=(7, 2),
                rejected_prompt_ids=(1, 5),
                rejected_ids=(8, 9, 2),
                row=preferences(WORLD, "train")[0],
            ),
        ),
        prompt_length=4,
        response_length=4,
        pad_id=tk.pad_id(tokenizer),
    )
    [(batch, _)] = b.eval_batches(rows, 1)
    assert batch.chosen.tokens.tolist() == [[0, 1, 5, 6, 7, 2, 0, 0]]
    assert batch.rejected.tokens.tolist() == [[0, 0, 1, 5, 8, 9, 2, 0]]
    assert batch.chosen.token_mask.tolist() == [[False, True, True, True, True, True, False, False]]
    assert batch.rejected.response_mask.tolist() == [[True, True, True, False]]
