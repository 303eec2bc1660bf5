"""Whole rankings as batches: every response in its place, ranks, masks and votes by hand, what is refused."""

import json

import numpy as np
import pytest

from rlhf_jax.data import batches, prepared, rankings, readers
from rlhf_jax.data.rows import Comparison, Ranking, with_soft_label
from rlhf_jax.data.world import WorldConfig, world_tokenizer
from rlhf_jax.data.world import rankings as world_rankings
from rlhf_jax.errors import InputError

TOKENIZER = world_tokenizer()
WIDTHS = {"prompt_length": 6, "response_length": 8}
RECORDS = [
    {
        "prompt": "bold warm",
        "responses": ["dull", "great cast .", "weak"],
        "ranks": [[2, 1, 2], [3, 1, 2], [1, 2, 3]],
    },
    {"prompt": "clever", "responses": ["fresh", "stale and cheap ."], "ranks": [2, 1]},
    {"prompt": "flat", "responses": ["dull", "weak", "cheap", "stale"], "ranks": [4, 3, 2, 1]},
]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "ranked.jsonl"
    path.write_text("\n".join(map(json.dumps, RECORDS)))
    return path


def encoded_of(rows, size=4, **given):
    return rankings.encode_rankings(rows, TOKENIZER, ranking_size=size, **{**WIDTHS, **given})


def words(batch, prompt, response):
    own = batch.responses
    ids = own.tokens[prompt, response][own.token_mask[prompt, response]]
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def test_a_batch_by_hand(path):
    rows, _ = readers.read_rankings(path)
    encoded, report = encoded_of(rows)
    assert report.kept == 3
    [(batch, _)] = batches.eval_batches(encoded, 3)
    assert batch.responses.tokens.shape == (3, 4, 14) and batch.responses.response_mask.shape == (3, 4, 8)
    np.testing.assert_array_equal(batch.mask.sum(axis=1), [3, 2, 4])
    # The second beats the first by 2 to 1 and the third by 3 to 0; the first and the third are even.
    assert batch.ranks[batch.mask].tolist() == [1, 0, 1, 1, 0, 3, 2, 1, 0]
    assert [words(batch, 0, i) for i in range(3)] == [
        "bold warm dull",
        "bold warm great cast .",
        "bold warm weak",
    ]
    assert words(batch, 1, 1) == "clever stale and cheap ."
    # EOS included; what is masked out is a response too, so that no row of the model is empty.
    assert batch.responses.response_mask[0].sum(axis=1).tolist() == [2, 4, 2, 2]
    assert batch.responses.response_mask.any(axis=2).all()
    assert batch.probability is None


def test_votes_become_how_likely_an_order_is(path):
    rows = [with_soft_label(row, 0.5) for row in readers.read_rankings(path)[0]]
    encoded, _ = encoded_of(rows)
    [(batch, _)] = batches.eval_batches(encoded, 3)
    likely = batch.probability
    assert likely.shape == (3, 4, 4) and likely.dtype == np.float32
    # 1 of 3 voted for the first over the second; with half a vote more for each, 1.5 of 4.
    np.testing.assert_allclose([likely[0, 0, 1], likely[0, 1, 0]], [1.5 / 4, 2.5 / 4])
    np.testing.assert_allclose([likely[0, 0, 2], likely[0, 1, 2]], [0.5, 3.5 / 4], rtol=1e-6)
    np.testing.assert_allclose(likely[1, 1, 0], 1.5 / 2)


def test_two_that_nobody_compared_are_as_certain_as_their_ranks():
    comparisons = (
        Comparison(first=0, second=1, for_first=1, for_second=0),
        Comparison(first=1, second=2, for_first=3, for_second=1),
    )
    row = Ranking(prompt="p", responses=("a", "b", "c"), comparisons=comparisons, source="s")
    likely = rankings.orders(with_soft_label(row, 0.0), 3)
    assert (likely[0, 1], likely[1, 0], likely[1, 2], likely[0, 2]) == (1.0, 0.0, 0.75, 1.0)


@pytest.mark.parametrize("soft", [False, True])
def test_a_prepared_set_gives_the_batches_of_its_file(path, soft):
    prepared.prepare(path, "rankings", path.with_suffix(""))
    rows, _ = readers.read_rankings(path)
    kept = prepared.open_prepared(path.with_suffix("")).rows
    if soft:
        rows = [with_soft_label(row, 1.0) for row in rows]
        kept = kept.convert(soften, "soft 1.0")
    found = []
    for source in (rows, kept):
        encoded, _ = encoded_of(source)
        iterator = batches.preference_batches(encoded, batch_size=2, seed=1)
        found.append([next(iterator) for _ in range(3)])
    for of_file, of_set in zip(*found, strict=True):
        assert (of_file.probability is None) == (not soft)
        for name in ("ranks", "mask", "probability"):
            np.testing.assert_array_equal(getattr(of_file, name), getattr(of_set, name))
        np.testing.assert_array_equal(of_file.responses.tokens, of_set.responses.tokens)


def soften(row):
    return with_soft_label(row, 1.0)


def test_rankings_that_do_not_fit(path):
    rows, _ = readers.read_rankings(path)
    with pytest.raises(
        InputError, match="jsonl:3 has 4 responses where ranking_size is 3: raise --config.data.ranking_size"
    ):
        encoded_of(rows, size=3)
    encoded, report = encoded_of(rows, size=3, truncation="drop")
    assert len(encoded) == report.kept == 2
    assert [source.rpartition(":")[2] for source, _ in report.dropped] == ["3"]
    # Longer responses than there is room for, of any of a ranking's.
    encoded, report = encoded_of(rows, response_length=4, truncation="drop")
    assert [source.rpartition(":")[2] for source, _ in report.dropped] == ["2"]
    same = Ranking(
        prompt="p",
        responses=("zzz", "yyy", "xxx"),
        comparisons=(Comparison(first=0, second=1, for_first=1, for_second=0),),
        source="s:9",
    )
    with pytest.raises(InputError, match="s:9 has 3 responses of the same tokens: give a tokenizer"):
        encoded_of([same])


def test_the_first_and_the_last_of_each_ranking(path):
    rows, _ = readers.read_rankings(path)
    encoded, _ = encoded_of(rows)
    found = rankings.best_and_worst(encoded, 2)
    assert [(row.row.chosen, row.row.rejected) for row in found.rows] == [
        ("great cast .", "dull"),
        ("stale and cheap .", "fresh"),
    ]
    [(batch, _)] = batches.eval_batches(found, 2)
    own = TOKENIZER.decode(batch.chosen.tokens[0][batch.chosen.token_mask[0]], skip_special_tokens=True)
    assert own == "bold warm great cast ."


def test_the_worlds_rankings_fit_and_buckets_are_narrower():
    rows = world_rankings(WorldConfig(num_preferences=40), size=3)
    encoded, _ = rankings.encode_rankings(
        rows, TOKENIZER, ranking_size=3, prompt_length=16, response_length=48
    )
    plain = next(batches.preference_batches(encoded, batch_size=8, seed=0))
    narrow = next(batches.preference_batches(encoded, batch_size=8, seed=0, num_buckets=2))
    assert plain.responses.tokens.shape == (8, 3, 64)
    assert narrow.responses.tokens.shape[:2] == (8, 3) and narrow.responses.tokens.shape[2] < 64


def test_votes_in_a_circle_teach_no_order_and_are_counted(tmp_path):
    """Of three annotators each pair is decided by two, and every response wins once."""
    path = tmp_path / "circle.jsonl"
    ranks = [[1, 2, 3], [2, 3, 1], [3, 1, 2]]
    rows = [
        {"prompt": "flat", "responses": ["dull", "weak", "cheap"], "ranks": ranks},
        {"prompt": "flat", "responses": ["dull", "weak", "cheap"], "ranks": ranks[:1]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoded, report = encoded_of(readers.read_rankings(path)[0])
    assert len(encoded.rows) == report.kept == 1
    assert [reason for _, reason in report.dropped] == ["has votes that put no response before another"]
