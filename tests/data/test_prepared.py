"""Prepared sets give back the rows they were made of, whole or not at all, and know when anything has changed."""

import json
import os
import pathlib
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_builders import huggingface_dataset_builder

from rlhf_jax.data import builders, files, prepared, readers
from rlhf_jax.data.rows import Comparison, Preference, ProcessSteps, Ranking, group_of
from rlhf_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[2]
TURNS = [{"role": "system", "content": ""}, {"role": "user", "content": "Hä?"}]
SAID = [{"role": "assistant", "content": " Ja. "}]
# Two records of each kind, with everything that may be left out there once, and left out once.
RECORDS = {
    "demonstrations": [{"messages": [*TURNS, *SAID], "group": "g"}, {"prompt": "p", "response": "r 猫"}],
    "preferences": [
        {"prompt": TURNS, "chosen": SAID, "rejected": "no", "votes_chosen": 3, "votes_rejected": 1},
        {"prompt": "p", "chosen": "a", "rejected": "b", "group": "g"},
    ],
    "rankings": [
        {"prompt": TURNS, "responses": ["a", "b"], "ranks": [[1, 2], [2, 1], [1, 1], [1, 2]]},
        {"prompt": "p", "completions": ["x", "y", "z"], "ranks": [3, 2, 1]},
    ],
    "prompts": [{"prompt": TURNS, "answer": "7"}, "just text"],
    "steps": [
        {"prompt": "p", "completions": ["a", "b"], "labels": [True, None], "answer": "3"},
        {"prompt": "p", "completions": ["a"], "labels": [0.25]},
    ],
    "unpaired": [{"prompt": TURNS, "completion": SAID, "label": True}, {"text": "film .", "label": 0}],
}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("kind", RECORDS)
def test_rows_come_back_as_a_reader_gives_them(tmp_path, kind):
    path = write(tmp_path / "in.jsonl", RECORDS[kind])
    manifest = prepared.prepare(path, kind, tmp_path / "set")
    assert (manifest.kind, manifest.rows, manifest.records, manifest.skipped) == (kind, 2, 2, ())
    assert manifest == prepared.read_manifest(tmp_path / "set")
    opened = prepared.open_prepared(tmp_path / "set")
    expected, _ = readers.read_all(path, builders.KINDS[kind].to_rows)
    assert list(opened.rows) == expected
    assert opened.rows.fetch(np.array([1, 0, 1])) == [expected[1], expected[0], expected[1]]
    assert list(opened.rows[1:]) == expected[1:]
    assert opened.rows[-1] == expected[-1]
    assert (opened.groups[0] == opened.groups[1]) == (group_of(expected[0]) == group_of(expected[1]))


def test_what_files_do_not_have_survives_too(tmp_path):
    """Known probabilities and gold rewards (float32), through TFDS's own way of preparing, split and order included."""
    rows = [
        Preference(
            prompt=f"p{i}",
            chosen="c",
            rejected="r",
            source="s",
            probability=0.5,
            chosen_gold=1.5,
            rejected_gold=-2.0,
        )
        for i in range(300)
    ]
    builder = builders.Preferences(rows=rows, data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    source = tfds.builder_from_directory(builder.data_dir).as_data_source("train")
    assert [builders.KINDS["preferences"].decode(example) for example in source] == rows
    assert "tensorflow" not in sys.modules


def test_many_shards_keep_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "_ROWS_A_SHARD", 70)
    monkeypatch.setattr(prepared, "_ROWS_A_WRITE", 40)
    path = write(tmp_path / "in.jsonl", [{"prompt": f"p{i}"} for i in range(500)])
    shares = []
    prepared.prepare(
        path, "prompts", tmp_path / "set", progress=lambda rows, share: shares.append((rows, share))
    )
    assert shares == sorted(shares) and shares[-1] == (499, 1.0)
    assert len(list((tmp_path / "set").rglob("*array_record*"))) == 8
    opened = prepared.open_prepared(tmp_path / "set")
    assert [row.prompt for row in opened.rows] == [f"p{i}" for i in range(500)]


def test_splits_are_by_group_and_those_of_the_reader(tmp_path):
    records = [{"prompt": f"p{i % 11}", "response": str(i)} for i in range(80)]
    path = write(tmp_path / "in.jsonl", records)
    prepared.prepare(path, "demonstrations", tmp_path / "set")
    opened = prepared.open_prepared(tmp_path / "set")
    out = readers.is_held_out(opened.groups, held_out_fraction=0.3, seed=4)
    train, held_out = (opened.rows.select(np.flatnonzero(out == side)) for side in (False, True))
    assert sorted([*train, *held_out], key=lambda row: int(row.response)) == list(opened.rows)
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}
    assert 24 <= len(held_out) < 24 + 8
    rows, _ = readers.read_demonstrations(path)
    assert (list(train), list(held_out)) == readers.split_by_group(rows, held_out_fraction=0.3, seed=4)
    assert not readers.is_held_out(opened.groups, held_out_fraction=0.0, seed=4).any()
    with pytest.raises(InputError, match="held_out_fraction is 1.0"):
        readers.is_held_out(opened.groups, held_out_fraction=1.0, seed=4)


@pytest.fixture
def small(tmp_path):
    """(source, prepared set) of 40 prompts."""
    source = write(tmp_path / "in.jsonl", [{"prompt": f"p{i}"} for i in range(40)])
    prepared.prepare(source, "prompts", tmp_path / "set")
    return source, tmp_path / "set"


def test_a_source_that_changes_after_preparation_is_refused(small):
    source, directory = small
    text = source.read_text()
    source.write_text(text)  # touched, not changed
    assert len(prepared.open_prepared(directory).rows) == 40
    source.write_text(text.replace("p39", "p93"))
    with pytest.raises(
        InputError, match=r"in.jsonl has changed since .*set was prepared .*: prepare it again, or"
    ):
        prepared.open_prepared(directory)
    source.unlink()  # what is gone is not missed
    assert len(prepared.open_prepared(directory).rows) == 40


def test_a_damaged_set_is_refused(small):
    _, directory = small
    (records,) = directory.rglob("*array_record*")
    whole = records.read_bytes()
    records.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(
        InputError, match="is not what was written .its SHA-256 differs.: restore it, or prepare"
    ):
        prepared.open_prepared(directory)
    records.unlink()
    with pytest.raises(InputError, match="lacks prompts/1.0.0/.*: prepare it again"):
        prepared.open_prepared(directory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is no prepared set: make one with experiments.prepare_data"),
        ("{", "prepared.json cannot be read .*: prepare the set again"),
        ("[]", "prepared.json cannot be read .*: prepare the set again"),
        ('{"format": 99}', "is of another version of this project: prepare the set again"),
        ('{"format": 1, "kind": "prompts"}', "cannot be read"),
    ],
)
def test_a_manifest_that_is_none(small, text, message):
    _, directory = small
    path = directory / "prepared.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(InputError, match=message):
        prepared.open_prepared(directory)


def test_nothing_is_left_where_a_row_is_bad(tmp_path):
    path = write(tmp_path / "in.jsonl", [{"prompt": "p"}] * 3 + [{"prompt": ""}])
    with pytest.raises(InputError) as error:
        prepared.prepare(path, "prompts", tmp_path / "set")
    assert str(error.value) == f"line 4 of {path} has an empty 'prompt': mend it or pass --on_bad_row=skip."
    assert os.listdir(tmp_path) == ["in.jsonl"]
    manifest = prepared.prepare(path, "prompts", tmp_path / "set", on_bad_row="skip")
    assert (manifest.rows, manifest.records, manifest.skipped) == (
        3,
        4,
        (("in.jsonl:4", "has an empty 'prompt'"),),
    )
    with pytest.raises(InputError, match="set exists already: give another output, or remove it first"):
        prepared.prepare(path, "prompts", tmp_path / "set", on_bad_row="skip")
    with pytest.raises(InputError, match="the kind is 'pairs': use one of demonstrations, preferences"):
        prepared.prepare(path, "pairs", tmp_path / "other")


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path):
    path = write(tmp_path / "in.jsonl", [{"prompt": f"p{i}"} for i in range(40)])

    def meddle(rows, share):
        if rows == 20:
            with path.open("a") as stream:
                stream.write('{"prompt": "late"}\n')

    with pytest.raises(InputError, match="in.jsonl changed while it was read: run the same command again"):
        prepared.prepare(path, "prompts", tmp_path / "set", progress=meddle)
    assert os.listdir(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize("when", [0, 20])
def test_a_source_that_goes_while_it_is_read_is_named(tmp_path, when):
    """The second of two shards, before it was opened; and the one that is being read."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in ("a", "b"):
        write(shards / f"{name}.jsonl", [{"prompt": f"{name}{i}"} for i in range(40)])

    def meddle(rows, share):
        if rows == when:
            (shards / ("a.jsonl" if when else "b.jsonl")).unlink()

    name = "a" if when else "b"
    with pytest.raises(
        InputError, match=rf"{name}.jsonl cannot be read \(No such file or directory\): restore it, or give"
    ):
        prepared.prepare(shards, "prompts", tmp_path / "set", progress=meddle)
    assert os.listdir(tmp_path) == ["shards"]


def test_a_shard_that_comes_after_preparation_is_refused(tmp_path, monkeypatch):
    shards = tmp_path / "shards"
    shards.mkdir()
    write(shards / "a.jsonl", [{"prompt": f"p{i}"} for i in range(40)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match="shards/set lies in shards, all of which is read: give an output else"
    ):
        prepared.prepare("shards", "prompts", "shards/set")
    prepared.prepare("shards", "prompts", "set")
    monkeypatch.chdir("/")
    (shards / "notes.md").write_text("no shard")
    assert len(prepared.open_prepared(tmp_path / "set").rows) == 40
    write(shards / "b.jsonl.gz", [])
    with pytest.raises(
        InputError, match=r"b.jsonl.gz was not there when .*set was prepared from .*shards: pre"
    ):
        prepared.open_prepared(tmp_path / "set")
    (shards / "b.jsonl.gz").unlink()
    (shards / "a.jsonl").unlink()  # what is gone is not missed
    assert len(prepared.open_prepared(tmp_path / "set").rows) == 40


def test_what_an_earlier_attempt_left_is_in_nobodys_way(tmp_path):
    path = write(tmp_path / "in.jsonl", [{"prompt": "p"}])
    (tmp_path / "set.partial" / "prompts").mkdir(parents=True)
    prepared.prepare(path, "prompts", tmp_path / "set")
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "set"]


FULL = """
import resource, sys
from rlhf_jax.data import prepared
from rlhf_jax.errors import InputError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    prepared.prepare(sys.argv[1], "prompts", sys.argv[2])
except InputError as error:
    print(error)
"""


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path):
    """A limit on the size of a file stands in for the disk: the same call fails, with another number."""
    letters = np.random.default_rng(0).integers(97, 123, (300, 200), np.uint8)
    path = write(tmp_path / "in.jsonl", [{"prompt": row.tobytes().decode()} for row in letters])
    command = [sys.executable, "-c", FULL, str(path), str(tmp_path / "set")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=True)
    assert f"the disk of {tmp_path / 'set'} is full" in done.stdout, done.stderr
    assert "nothing was kept; free some space" in done.stdout
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_a_place_that_cannot_be_written(tmp_path):
    path = write(tmp_path / "in.jsonl", [{"prompt": "p"}])
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match="cannot write .*file/set .*: give an output in a directory that can be"
    ):
        prepared.prepare(path, "prompts", tmp_path / "file" / "set")


def test_any_tfds_data_set_is_a_source(tmp_path):
    """A data set of another making, texts and labels and conversations in TFDS's own clothes."""

    class Foreign(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("2.0.0")

        def _info(self):
            turn = {"role": tfds.features.Text(), "content": tfds.features.Text()}
            features = {
                "prompt": tfds.features.Sequence(turn),
                "completion": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["neg", "pos"]),
                "extra": tfds.features.Tensor(shape=(2,), dtype=np.float32),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(3), "test": self._generate_examples(2)}

        def _generate_examples(self, count):
            for i in range(count):
                turns = [{"role": "user", "content": f"q{i}"}]
                yield i, {"prompt": turns, "completion": f"a{i}", "label": i % 2, "extra": [0.5, i]}

    Foreign(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    for name, count in (("tfds:foreign", 3), ("tfds:foreign:test", 2)):
        manifest = prepared.prepare(name, "unpaired", tmp_path / f"set{count}", tfds_dir=str(tmp_path))
        assert manifest.records == count
        rows = sorted(prepared.open_prepared(tmp_path / f"set{count}").rows, key=lambda row: row.response)
        assert [(row.messages, row.response, row.desirable) for row in rows] == [
            ((("user", f"q{i}"),), f"a{i}", bool(i % 2)) for i in range(count)
        ]
        assert {row.source for row in rows} == {
            f"foreign/{name.partition('foreign:')[2] or 'train'}:{i + 1}" for i in range(count)
        }
    with pytest.raises(InputError, match="'foreign' has no split 'dev': use one of test, train"):
        prepared.prepare("tfds:foreign:dev", "unpaired", tmp_path / "other", tfds_dir=str(tmp_path))
    with pytest.raises(InputError, match="TFDS cannot give 'no_such_set' .*: check the name"):
        prepared.prepare("tfds:no_such_set", "unpaired", tmp_path / "other", tfds_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "repository", "config"),
    [
        ("Own/Pairs", "Own/Pairs", None),
        ("Own/Pairs/small:train", "Own/Pairs", "small"),
        ("own__pairs:train", "own/pairs", None),
        ("Pairs", "Pairs", None),
    ],
)
def test_names_of_the_hub_are_asked_for_as_they_are(tmp_path, monkeypatch, name, repository, config):
    """A stand-in for TFDS's reader of the Hub, which needs a network: which data set it would be asked for."""
    asked = []

    def reader(*, hf_repo_id, hf_config, data_dir, file_format):
        asked.append((hf_repo_id, hf_config))
        rows = [Preference(prompt="p", chosen="c", rejected="r", source="s")]
        return builders.Preferences(rows=rows, data_dir=data_dir, file_format=file_format)

    monkeypatch.setitem(sys.modules, "datasets", types.ModuleType("datasets"))
    monkeypatch.setattr(huggingface_dataset_builder, "HuggingfaceDatasetBuilder", reader)
    source = f"tfds:huggingface:{name}"
    prepared.prepare(source, "preferences", tmp_path / "set", tfds_dir=str(tmp_path / "tfds"))
    assert asked == [(repository, config)]
    assert [row.chosen for row in prepared.open_prepared(tmp_path / "set").rows] == ["c"]
    with pytest.raises(InputError, match="has no split 'dev': use one of train"):
        prepared.prepare(
            f"tfds:huggingface:{name.partition(':')[0]}:dev",
            "preferences",
            tmp_path / "b",
            tfds_dir=str(tmp_path),
        )


def test_the_hub_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        InputError, match="'huggingface:a/b' is of the Hugging Face Hub, .*: pip install datasets"
    ):
        prepared.prepare("tfds:huggingface:a/b", "preferences", tmp_path / "set")


def test_the_sources_of_rows_are_those_of_the_file(small):
    source, directory = small
    rows = prepared.open_prepared(directory).rows
    assert [row.source for row in rows] == [record.source for record in files.records(source)]


def test_labels_that_nobody_gave_stay_none(tmp_path):
    path = write(tmp_path / "in.jsonl", RECORDS["steps"])
    prepared.prepare(path, "steps", tmp_path / "set")
    first, second = prepared.open_prepared(tmp_path / "set").rows
    assert isinstance(first, ProcessSteps)
    assert (first.labels, second.labels) == ((1.0, None), (0.25,))


def test_votes_and_comparisons_stay_whole_numbers(tmp_path):
    path = write(tmp_path / "in.jsonl", RECORDS["rankings"])
    prepared.prepare(path, "rankings", tmp_path / "set")
    first = prepared.open_prepared(tmp_path / "set").rows[0]
    assert isinstance(first, Ranking)
    assert first.comparisons == (Comparison(first=0, second=1, for_first=2, for_second=1, for_neither=1),)
    assert type(first.comparisons[0].for_first) is int


# The whole of what people made, through the builder of its kind: records as its README counts them, records refused.
REAL = [
    ("preferences/hh_harmless_base_test.jsonl.gz", "preferences", 2312, 4),
    ("preferences/fgrlhf_qa_dev_feedback.json.gz", "rankings", 500, 12),
    ("preferences/fgrlhf_qa_dev_feedback.json.gz", "steps", 500, 0),
    ("demonstrations/dolly_3k.json", "demonstrations", 2996, 0),
    ("demonstrations/self_instruct_seed_tasks.jsonl", "demonstrations", 175, 0),
    ("math/gsm8k_test.jsonl.gz", "prompts", 1319, 0),
    ("math/openr_samples_prm800k.jsonl", "steps", 6, 0),
    ("math/openr_samples_math-shepherd.jsonl", "steps", 7, 0),
    ("math/openr_samples_math-aps.jsonl", "steps", 3, 0),
    ("math/openr_samples_math-aps-tree.jsonl", "steps", 3, 0),
    ("preferences/ukp_convarg1_strict_pairs.jsonl.gz", "preferences", 11_642, 0),
    ("math/gsm8k_train.jsonl.gz", "demonstrations", 7473, 0),
    ("math/openr_game24_train_dedup.jsonl.gz", "prompts", 1000, 0),
    ("math/openr_game24_train_dedup.jsonl.gz", "unpaired", 1000, 0),
    ("sentiment", "unpaired", 2 * 5331, 0),
]


def rows_by_readme(text: str) -> dict[str, int]:
    """Rows of each file of preferences, demonstrations, mathematics and sentiment that the README's table names."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        folder = cells[0].partition("/")[0]
        if folder not in FOLDERS:
            continue
        first, *others = cells[0].split(", ")
        head, brace, rest = first.partition("{")
        inside, _, tail = rest.partition("}")
        names = [f"{head}{part}{tail}" for part in inside.split(",")] if brace else [first]
        names += [
            first.rpartition(".")[0] + name if name.startswith(".") else f"{folder}/{name}" for name in others
        ]
        counts = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", cells[2])]
        counts *= len(names) if "each" in cells[2] else 1
        found |= dict(zip(names, counts, strict=True))
    return found


FOLDERS = ("preferences", "demonstrations", "math", "sentiment")


def test_every_file_that_is_there_is_prepared_below_with_the_rows_that_its_readme_says(shared_data):
    counts = rows_by_readme((shared_data / "README.md").read_text())
    there = {
        str(file.relative_to(shared_data)) for name in FOLDERS for file in (shared_data / name).iterdir()
    }
    assert there == set(counts)
    below = {name: records for name, _, records, _ in REAL}
    assert below.pop("sentiment") == counts.pop("sentiment/rt-polarity.pos") + counts.pop(
        "sentiment/rt-polarity.neg"
    )
    assert below == counts


@pytest.mark.parametrize(("name", "kind", "records", "refused"), REAL)
def test_real_data_through_the_builders(tmp_path, shared_data, name, kind, records, refused):
    path = shared_data / name
    if not path.exists():
        pytest.skip(f"real input missing: {path}")
    manifest = prepared.prepare(path, kind, tmp_path / "set", on_bad_row="skip")
    assert (manifest.records, len(manifest.skipped)) == (records, refused)
    opened = prepared.open_prepared(tmp_path / "set")
    expected, _ = readers.read_all(path, builders.KINDS[kind].to_rows, on_bad_row="skip")
    assert len(opened.rows) == len(expected)
    places = np.random.default_rng(0).choice(len(expected), min(len(expected), 200), replace=False)
    for row, place in zip(opened.rows.fetch(places), places, strict=True):
        if kind == "steps":  # labels are stored as float32
            known = [(a, b) for a, b in zip(row.labels, expected[place].labels, strict=True) if b is not None]
            assert [a for a, _ in known] == pytest.approx([b for _, b in known], abs=1e-7)
            assert [a is None for a in row.labels] == [b is None for b in expected[place].labels]
            assert (row.prompt, row.steps) == (expected[place].prompt, expected[place].steps)
        else:
            assert row == expected[place]
