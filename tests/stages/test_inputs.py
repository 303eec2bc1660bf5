"""Rows of a stage from files, prepared sets and several of them, and what a stage does with votes and batches."""

import json

import jax
import numpy as np
import pytest

from rlhf_jax.data import batches, mixtures, packing, prepared
from rlhf_jax.data.arithmetic import arithmetic_tokenizer
from rlhf_jax.data.mixtures import Mixture
from rlhf_jax.data.prepared import PreparedRows
from rlhf_jax.data.rows import Demonstration, Prompt
from rlhf_jax.data.world import WorldConfig, demonstrations, world_tokenizer
from rlhf_jax.errors import InputError
from rlhf_jax.models import decoder, heads
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.stages import inputs, reward_objectives, sft
from rlhf_jax.stages.inputs import BatchConfig, DataConfig

WORDS = ["bold", "warm", "clever", "fresh", "great", "dull", "weak", "flat", "stale", "cheap"]


def pair(i, prefix=""):
    return {
        "prompt": f"{prefix}{WORDS[i % 10]} {WORDS[i % 7]}",
        "chosen": f"{WORDS[i % 9]} warm",
        "rejected": f"{WORDS[i % 9]} dull" + " weak" * (i % 4),
        "votes_chosen": 4,
        "votes_rejected": i % 3,
        "votes_equal": 1,
        "group": f"g{i % 13}",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of pairs, questions, rankings and solutions in steps, and sets prepared from them."""
    folder = tmp_path_factory.mktemp("inputs")
    questions = [{"question": f"{WORDS[i]} ?", "answer": f"#### {i}"} for i in range(10)]
    ranked = [{"prompt": f"{i}", "responses": ["a", "b"], "ranks": [1, 2]} for i in range(4)]
    judged = [
        {
            "prompt": f"{i}+5=",
            "completions": [f"{i}+5={i + 5}", "1" * (1 + i % 4)],
            "labels": [[True, None], [False, 0.5], [True, True]][i % 3],
        }
        for i in range(20)
    ]
    every = {"pairs": [pair(i) for i in range(80)], "questions": questions, "ranked": ranked, "steps": judged}
    for name, rows in every.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kinds = {"pairs": "preferences", "questions": "prompts", "ranked": "rankings", "steps": "steps"}
    for name, kind in kinds.items():
        prepared.prepare(folder / f"{name}.jsonl", kind, folder / name)
    return folder


LOADERS = {
    "preferences": inputs.load_preferences,
    "demonstrations": inputs.load_demonstrations,
    "prompts": inputs.load_prompts,
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_prepared_set_gives_the_rows_of_its_file(folder, kind):
    of_file = LOADERS[kind](DataConfig(path=str(folder / "pairs.jsonl")))
    of_set = LOADERS[kind](DataConfig(path=str(folder / "pairs")))
    assert isinstance(of_set.train, PreparedRows)
    for side in ("train", "held_out"):  # the same groups are held out
        assert list(getattr(of_set, side)) == list(getattr(of_file, side))
    assert {row.group for row in of_set.train} | {row.group for row in of_set.held_out} == {
        f"g{i}" for i in range(13)
    }
    assert not {row.group for row in of_set.train} & {row.group for row in of_set.held_out}


def test_sft_learns_what_was_chosen_and_prompts_come_once(folder):
    data = DataConfig(path=str(folder / "pairs"))
    rows = list(inputs.load_demonstrations(data).train)
    assert all(type(row) is Demonstration and row.response.endswith(" warm") for row in rows)
    once = list(inputs.load_prompts(data).train)
    assert all(type(row) is Prompt for row in once)
    assert [row.prompt for row in once] == list(dict.fromkeys(row.prompt for row in rows))


@pytest.mark.parametrize("path", ["questions", "questions.jsonl"])
def test_prompts_keep_their_answers(folder, path):
    split = inputs.load_prompts(DataConfig(path=str(folder / path), format="prompts"))
    assert {(row.prompt, row.answer) for row in [*split.train, *split.held_out]} == {
        (f"{WORDS[i]} ?", str(i)) for i in range(10)
    }


def test_sources_are_mixed_on_disk_and_in_memory(folder):
    data = DataConfig(path=f"{folder / 'pairs'},{folder / 'pairs.jsonl'}", weights="3,1")
    split = inputs.load_demonstrations(data)
    assert isinstance(split.train, Mixture) and split.train.weights == (3.0, 1.0)
    assert len(split.train) + len(split.held_out) == 160
    encoded, report = batches.encode_demonstrations(
        split.train, world_tokenizer(), prompt_length=16, response_length=16
    )
    assert report.kept == len(encoded) == len(split.train)
    assert [source.weight for source in encoded.sources] == [3.0, 1.0]
    iterator = inputs.demonstration_batches(BatchConfig(), encoded, batch_size=8, seed=0)
    assert next(iterator).tokens.shape == (8, 32)


@pytest.mark.parametrize("kind", LOADERS)
def test_a_group_of_several_sources_is_on_one_side_in_all(folder, kind):
    """Other rows of g5 to g12, and of groups of its own, in a second file of other sizes."""
    rows = [pair(i, "so ") for i in range(80) if i % 13 > 4 and i % 3 or i % 13 == 6]
    rows += [pair(i, "oh ") | {"group": f"h{i % 5}"} for i in range(30)]
    (folder / "second.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for first in ("pairs", "pairs.jsonl"):
        for seed in range(4):
            data = DataConfig(
                path=f"{folder / first},{folder / 'second.jsonl'}", split_seed=seed, held_out_fraction=0.3
            )
            split = LOADERS[kind](data)
            train, held_out = ({row.group for row in side} for side in (split.train, split.held_out))
            assert not train & held_out and train | held_out == {row["group"] for row in rows} | {
                f"g{i}" for i in range(13)
            }
            if kind != "prompts":
                assert 0.3 * (80 + len(rows)) <= len(split.held_out) < 0.5 * (80 + len(rows))


def test_a_source_that_is_held_out_whole_is_refused(folder):
    rows = [pair(i) for i in range(80) if i % 13 == 0]
    (folder / "one.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = f"{folder / 'pairs'},{folder / 'one.jsonl'}"
    found = []
    for seed in range(40):
        try:
            split = inputs.load_preferences(DataConfig(path=path, split_seed=seed, held_out_fraction=0.3))
            assert isinstance(split.train, Mixture) and not isinstance(split.held_out, Mixture)
        except InputError as error:
            found.append(str(error))
    assert 0 < len(found) < 40
    assert (
        "one.jsonl has nothing to train on: all its 7 rows are of groups that are held out; lower" in found[0]
    )


def test_evaluation_prompts_are_of_every_source_in_turn(folder):
    split = inputs.load_prompts(DataConfig(path=f"{folder / 'pairs'},{folder / 'pairs.jsonl'}"))
    first, second = (list(part) for part in split.held_out.parts)
    assert len(first) == len(second) > 2
    in_turn = [row for rows in zip(first, second, strict=True) for row in rows]
    assert split.first_held_out(3) == in_turn[:3]
    assert split.first_held_out(1000) == in_turn
    parts = (first, second[:1], split.held_out.parts[0])
    mixture = Mixture(parts=parts, weights=(1.0, 2.0, 3.0))
    assert mixtures.in_turn(mixture, 5) == [first[0], second[0], first[0], first[1], first[1]]


@pytest.mark.parametrize(("truncation", "response_length"), [("error", 20), ("keep_start", 10)])
def test_steps_come_from_a_file_and_from_its_prepared_set(folder, truncation, response_length):
    """Rows, what they are encoded as, what is left out, and batches."""
    data = {"truncation": truncation, "prompt_length": 16, "response_length": response_length}
    found = []
    for name in ("steps.jsonl", "steps"):
        split = inputs.load_process_steps(DataConfig(path=str(folder / name), format="prompts"))
        rows, report = batches.encode_process_steps(
            split.train, arithmetic_tokenizer(), step_mark=";", **data
        )
        iterator = batches.steps_batches(rows, batch_size=4, seed=0)
        found.append((list(split.held_out), list(rows.rows), report, [next(iterator) for _ in range(4)]))
    (*of_file, first), (*of_set, second) = found
    assert of_file == of_set
    assert bool(of_file[2].truncated) == (truncation != "error")
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert first[0].step_mask.any()


def test_steps_that_hold_the_mark_are_found_when_a_set_is_scanned(folder):
    split = inputs.load_process_steps(DataConfig(path=str(folder / "steps")))
    how = {"prompt_length": 16, "response_length": 40, "step_mark": "="}
    with pytest.raises(InputError, match=r"steps.jsonl:\d+ has 2 steps, and 3 when divided at '='.*drop"):
        batches.encode_process_steps(split.train, arithmetic_tokenizer(), **how)
    with pytest.raises(InputError, match="rows were dropped, .* divided at '=': give a --config.step_mark"):
        batches.encode_process_steps(split.train, arithmetic_tokenizer(), truncation="drop", **how)


BAD = [
    (
        {"path": "{0}/ranked"},
        "preferences",
        "ranked holds rankings where preferences are needed; .* --kind=preferences",
    ),
    (
        {"path": "{0}/ranked"},
        "demonstrations",
        "holds rankings where demonstrations or preferences are needed",
    ),
    (
        {"path": "{0}/ranked"},
        "prompts",
        "holds rankings where prompts are needed; prepare a set with --kind=prompts",
    ),
    ({"path": "{0}/questions"}, "preferences", "holds prompts where preferences are needed"),
    (
        {"path": "{0}/pairs.jsonl", "format": "prompts"},
        "demonstrations",
        "holds prompts where demonstrations or",
    ),
    ({"path": "{0}/pairs,{0}/absent.jsonl"}, "preferences", "absent.jsonl does not exist: check the path"),
    (
        {"path": "gs://bucket/a.jsonl"},
        "preferences",
        "^gs://bucket/a.jsonl is a URL, .*; mount what it names",
    ),
    (
        {"path": "{0}/pairs,gs://b/a.jsonl"},
        "prompts",
        "^gs://b/a.jsonl is a URL, and here a directory is needed",
    ),
    ({"path": "{0}/pairs", "weights": "1,2"}, "preferences", "weights=1,2 has 2 numbers for the 1 paths"),
    (
        {"path": "{0}/pairs,{0}/pairs", "weights": "1,x"},
        "preferences",
        "weights=1,x are not numbers with commas",
    ),
    (
        {"path": "{0}/pairs,{0}/pairs", "weights": "1,0"},
        "preferences",
        "a source has the weight 0.0: give a positive",
    ),
    ({"path": "{0}/pairs", "held_out_fraction": 0.0}, "preferences", "and 0 held out for evaluation"),
]


@pytest.mark.parametrize(("given", "kind", "message"), BAD)
def test_what_cannot_be_loaded(folder, given, kind, message):
    given = {**given, "path": given["path"].format(folder)}
    with pytest.raises(InputError, match=message):
        LOADERS[kind](DataConfig(**given))


@pytest.mark.parametrize("path", ["pairs", "pairs.jsonl"])
def test_votes_become_the_targets_of_batches(folder, path):
    data = DataConfig(path=str(folder / path), soft_labels=True, vote_prior=0.5)
    split = inputs.load_preferences(data)
    encoded, _ = batches.encode_preferences(
        split.held_out, world_tokenizer(), prompt_length=16, response_length=16
    )
    [(batch, _)] = batches.eval_batches(encoded, len(encoded))
    lost = np.array([int(row.source.rpartition(":")[2]) - 1 for row in split.held_out]) % 3
    assert batch.probability.dtype == np.float32 and len(set(lost)) == 3
    np.testing.assert_allclose(batch.probability, (4 + 0.5 + 0.5) / (4 + lost + 1 + 1), rtol=1e-6)
    hard = inputs.load_preferences(DataConfig(path=str(folder / path)))
    encoded, _ = batches.encode_preferences(
        hard.held_out, world_tokenizer(), prompt_length=16, response_length=16
    )
    assert next(batches.eval_batches(encoded, 4))[0].probability is None


def test_the_worlds_own_probabilities_are_soft_labels_too():
    world = WorldConfig(num_demonstrations=4, num_preferences=6, num_prompts=4)
    split = inputs.load_preferences(DataConfig(world=world, soft_labels=True))
    assert [row.target for row in split.train] == [row.probability for row in split.train]
    assert len(set(row.target for row in split.train)) > 3


def test_batches_as_the_config_says(folder):
    split = inputs.load_preferences(DataConfig(path=str(folder / "pairs")))
    tokenizer = world_tokenizer()
    pairs, _ = batches.encode_preferences(split.train, tokenizer, prompt_length=16, response_length=16)
    texts, _ = batches.encode_demonstrations(
        inputs.load_demonstrations(DataConfig(path=str(folder / "pairs"))).train,
        tokenizer,
        prompt_length=16,
        response_length=16,
    )
    how = {"batch_size": 8, "seed": 3}
    packed = next(inputs.demonstration_batches(BatchConfig(), texts, pack=True, **how))
    assert packed.segment_ids.max() > 2
    narrow = next(inputs.demonstration_batches(BatchConfig(num_buckets=2), texts, **how))
    assert narrow.segment_ids is None and narrow.tokens.shape[1] < 32
    assert (
        next(inputs.preference_batches(BatchConfig(num_buckets=2), pairs, **how)).chosen.tokens.shape[1] < 32
    )
    plain = inputs.preference_batches(BatchConfig(), pairs, **how)
    for one, other in zip(
        jax.tree.leaves(next(plain)),
        jax.tree.leaves(next(batches.preference_batches(pairs, **how))),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    for bad, message in (
        ({"num_buckets": 0}, "num_buckets is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
    ):
        with pytest.raises(InputError, match=message):
            BatchConfig(**bad)
    with pytest.raises(InputError, match="pack is True with batches.num_buckets=2; .* give one of the two"):
        sft.Config(pack=True, batches=BatchConfig(num_buckets=2))


def tiny(tokenizer) -> ModelConfig:
    return ModelConfig(
        vocab_size=len(tokenizer),
        width=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_width=24,
        max_length=64,
    )


@pytest.mark.slow
def test_packed_loss_is_the_unpacked_loss_of_sft():
    """Of the stage's own objective over every demonstration: value and gradient agree to 1e-6 of their size."""
    rows = demonstrations(WorldConfig(seed=3, num_demonstrations=37, num_preferences=1, num_prompts=1))
    encoded, _ = batches.encode_demonstrations(rows, world_tokenizer(), prompt_length=16, response_length=48)
    config = tiny(world_tokenizer())
    params = {"decoder": decoder.init_params(config, jax.random.key(0))["decoder"]}
    objective = sft.make_objective(config)

    @jax.jit
    @jax.value_and_grad
    def loss(params, batch):
        return objective(params, {}, batch)[0]["likelihood"].mean()

    [(whole, _)] = batches.eval_batches(encoded, len(encoded))
    num_bins = len(packing.pack(batches.lengths_of(encoded).sum(axis=1), 64, 5))
    how = {"batch_size": num_bins, "seed": 5}
    packed = next(inputs.demonstration_batches(BatchConfig(), encoded, pack=True, **how))
    assert num_bins < len(encoded) / 2
    assert packed.response_mask.sum() == whole.response_mask.sum()
    with jax.default_matmul_precision("float32"):
        value, gradient = loss(params, whole)
        packed_value, packed_gradient = loss(params, packed)
    np.testing.assert_allclose(packed_value, value, rtol=1e-6)
    size = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    for one, other in zip(jax.tree.leaves(packed_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 * size)


@pytest.mark.slow
def test_a_narrow_batch_has_the_loss_of_the_same_pairs_at_full_width(folder):
    """Of the reward model's own objective, over batches of two widths."""
    split = inputs.load_preferences(DataConfig(path=str(folder / "pairs")))
    tokenizer = world_tokenizer()
    encoded, _ = batches.encode_preferences(split.train, tokenizer, prompt_length=16, response_length=16)
    config = tiny(tokenizer)
    key = jax.random.key(0)
    params = decoder.init_params(config, key) | {"head": heads.init_scalar_head(config, key)}
    objective = jax.jit(reward_objectives.make_objective(config))
    [(whole, _)] = batches.eval_batches(encoded, len(encoded))
    said = {tuple(row[mask].tolist()): i for i, (row, mask) in enumerate(_said(whole))}
    iterator = inputs.preference_batches(BatchConfig(num_buckets=2), encoded, batch_size=8, seed=3)
    widths = set()
    for _ in range(6):
        narrow = next(iterator)
        places = [said[tuple(row[mask].tolist())] for row, mask in _said(narrow)]
        wide = jax.tree.map(lambda leaf, places=places: leaf[np.array(places)], whole)
        widths.add(narrow.chosen.tokens.shape[1])
        found, expected = (objective(params, {}, batch)[0] for batch in (narrow, wide))
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5)
    assert len(widths) == 2 and max(widths) < 32


def _said(batch):
    """(tokens, mask) of each pair, both sides one after the other."""
    tokens = np.concatenate([batch.chosen.tokens, batch.rejected.tokens], axis=1)
    masks = np.concatenate([batch.chosen.token_mask, batch.rejected.token_mask], axis=1)
    return list(zip(tokens, masks, strict=True))
