"""Oracle: the bytes of the tokens drawn so far, joined and searched anew after each token."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.errors import InputError
from rlhf_jax.models import decoder
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.sampling.stop_strings import first_match, stop_table

# "é" is two bytes, each a token of its own as well as one together; id 0 is EOS, id 11 unknown to the tokenizer.
PIECES = [b"</s>", b"a", b"b", b"ab", b"ba", b"aab", b"\n", b"\n\n", b"\xc3", b"\xa9", b" \xc3\xa9"]
VOCAB, EOS = 12, 0


def table_of(*strings, most=100):
    return stop_table(strings, PIECES, vocab_size=VOCAB, eos_id=EOS, max_new_tokens=most)


def first_token_that_completes(tokens, strings):
    """How many tokens it takes until a stop string is in their text; None where it never is."""
    for count in range(1, len(tokens) + 1):
        said = b"".join(b"" if t in (EOS, 11) else PIECES[t] for t in tokens[:count])
        if any(string.encode() in said for string in strings):
            return count
    return None


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(st.integers(0, VOCAB - 1), max_size=12),
    strings=st.lists(st.text("ab\né", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_the_table_finds_what_a_search_finds(tokens, strings):
    table = table_of(*strings)
    state, found = 0, None
    for count, token in enumerate(tokens, 1):
        state = table[state, token]
        if state == len(table) - 1 and found is None:
            found = count
    assert found == first_token_that_completes(tokens, strings)


def test_a_table_by_hand():
    # States: nothing, "a", "aa", matched.
    table = table_of("aab")
    assert table.shape == (4, VOCAB)
    assert table.dtype == np.int16
    np.testing.assert_array_equal(table[:, 1], [1, 2, 2, 3])  # "a": after "aa" the last two count
    np.testing.assert_array_equal(
        table[:, 3], [0, 3, 3, 3]
    )  # "ab" ends it after "a", and leaves nothing before
    np.testing.assert_array_equal(table[:, 5], [3, 3, 3, 3])  # "aab" by itself
    np.testing.assert_array_equal(table[:, EOS], [0, 1, 2, 3])


CONFIG = ModelConfig(
    vocab_size=VOCAB,
    width=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_width=16,
    max_length=40,
)


@pytest.mark.parametrize("earliest", [0, 6])
def test_a_row_ends_with_the_token_that_completes_a_stop_string(earliest):
    params = decoder.init_params(CONFIG, jax.random.key(0))
    strings, new, rows = ("ba\n", "éa", "b\n\n"), 30, 16
    sampling = SamplingConfig(max_new_tokens=new, min_new_tokens=earliest)
    prompts = np.tile(np.array([[2, 1, 5]], np.int32), (rows, 1))
    run = jax.jit(functools.partial(generate, CONFIG, sampling=sampling, eos_id=EOS, pad_id=EOS))
    ended = by_stop = straddling = 0
    for seed in range(2):
        arguments = params, prompts, np.ones(prompts.shape, bool), jax.random.key(seed)
        stopped = jax.tree.map(np.asarray, run(*arguments, stop_table=table_of(*strings)))
        free = jax.tree.map(np.asarray, run(*arguments))
        for row in range(rows):
            said = free.tokens[row, 3 : 3 + free.response_mask[row].sum()]
            count = first_token_that_completes(said[earliest:], strings)
            length = len(said) if count is None else earliest + count
            np.testing.assert_array_equal(stopped.response_mask[row], np.arange(new) < length)
            np.testing.assert_array_equal(stopped.tokens[row, 3 : 3 + length], said[:length])
            np.testing.assert_array_equal(stopped.tokens[row, 3 + length :], EOS)
            np.testing.assert_allclose(stopped.log_probs[row, :length], free.log_probs[row, :length])
            assert stopped.terminated[row] == (count is not None or free.terminated[row])
            ended += free.terminated[row]
            by_stop += count is not None
            straddling += count is not None and count > 1 and said[earliest + count - 1] in (1, 6, 7)
    assert ended > 2
    assert by_stop > 5
    assert straddling > 2


def test_stop_strings_that_can_never_match_are_refused():
    with pytest.raises(InputError, match="a stop string is empty.*leave it out"):
        table_of("a", "")
    with pytest.raises(InputError, match="no stop string was given"):
        table_of()
    with pytest.raises(InputError, match="'cab' can never match, as no tokens .* give text that the model"):
        table_of("a", "cab")
    # EOS spells it, and ends the response by itself.
    with pytest.raises(InputError, match="'</s>' can never match"):
        table_of("</s>")
    # "aab" twice is two tokens; and "ab" twice may be found in "aab" + "ab".
    assert len(table_of("aabaab", most=2)) == 7
    with pytest.raises(InputError, match="'aabaab' can never match, as it takes 2 tokens and 1 are searched"):
        table_of("aabaab", most=1)


def test_no_table_is_another_size_than_the_vocabulary():
    pieces = PIECES + [b"never"] * 5
    table = stop_table(["b"], pieces, vocab_size=VOCAB, eos_id=EOS, max_new_tokens=1)
    assert table.shape == (2, VOCAB)
    with pytest.raises(InputError, match="'never' can never match"):
        stop_table(["never"], pieces[: VOCAB - 1], vocab_size=VOCAB, eos_id=EOS, max_new_tokens=9)


def test_the_first_match_of_a_text():
    assert first_match("é, a\nb".encode(), ["b", "\n", "zz"]) == 5
    assert first_match(b"abab", ["bab", "ab"]) == 0
    assert first_match(b"ab", ["c"]) is None
