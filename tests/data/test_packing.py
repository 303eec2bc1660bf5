"""Packed rows hold every demonstration once. That their loss is the unpacked one: tests/stages/test_inputs.py."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data import batches as b
from rlhf_jax.data.packing import lay_out_packed, pack
from rlhf_jax.data.world import WorldConfig, demonstrations, world_tokenizer
from rlhf_jax.errors import InputError

P, R = 16, 48


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=60), seed=st.integers(0, 3))
def test_every_row_is_in_one_bin_and_no_bin_overflows(lengths, seed):
    bins = pack(np.array(lengths), 30, seed)
    inside = [bins.of(i) for i in range(len(bins))]
    assert sorted(row for rows in inside for row in rows) == list(range(len(lengths)))
    for rows in inside:
        assert 0 < sum(lengths[row] for row in rows) <= 30
    # Best fit leaves at most one bin half empty: two such would have been one.
    assert sum(sum(lengths[row] for row in rows) <= 15 for rows in inside) <= 1
    # Within 11/9 of the fewest there can be, and a bin (Johnson et al. 1974); no fewer than the tokens need.
    assert len(bins) >= -(-sum(lengths) // 30)


def test_best_fit_by_hand():
    # 6 opens a bin, 5 another; 4 fills the first to the brim; 3 and 2 fill the second.
    bins = pack(np.array([2, 3, 4, 5, 6]), 10, seed=0)
    assert sorted(sorted(bins.of(i).tolist()) for i in range(len(bins))) == [[0, 1, 3], [2, 4]]
    with pytest.raises(ValueError, match="a row has 11 tokens, more than the 10"):
        pack(np.array([11]), 10, seed=0)


def test_layout_by_hand():
    row = lay_out_packed([((1, 5), (7, 2)), ((1,), (8, 9, 2))], 10, pad_id=0)
    assert row.tokens.tolist() == [1, 5, 7, 2, 1, 8, 9, 2, 0, 0]
    assert row.segment_ids.tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 0, 0]
    assert row.token_mask.tolist() == [True] * 8 + [False] * 2
    # Column c of the response mask is column c + 1 of the tokens.
    assert row.response_mask.tolist() == [False, True, True, False, True, True, True, False, False]


@pytest.fixture(scope="module")
def encoded():
    rows = demonstrations(WorldConfig(seed=3, num_demonstrations=37, num_preferences=1, num_prompts=1))
    return b.encode_demonstrations(rows, world_tokenizer(), prompt_length=P, response_length=R)[0]


def test_packed_batches_show_every_demonstration_once_an_epoch(encoded):
    iterator = b.packed_batches(encoded, batch_size=1, seed=5)
    expected = sorted((*row.prompt_ids, *row.response_ids) for row in encoded.rows)
    for _ in range(2):
        seen = []
        while len(seen) < len(expected):
            batch = next(iterator)
            for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
                seen += [tuple(tokens[segments == i].tolist()) for i in range(1, segments.max() + 1)]
        assert sorted(seen) == expected
    assert batch.tokens.shape == (1, P + R) and batch.response_mask.shape == (1, P + R - 1)


def test_weights_and_packing_do_not_go_together(encoded):
    sources = (b.pipeline.Source(start=0, count=10), b.pipeline.Source(start=10, count=27, weight=2.0))
    with pytest.raises(InputError, match="packed batches keep no weights of sources"):
        b.packed_batches(dataclasses.replace(encoded, sources=sources), batch_size=1, seed=0)
