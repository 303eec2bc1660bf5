"""Files become rows or one clear sentence; groups are never divided."""

import gzip
import hashlib
import json
import pathlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_jax.data.readers import (
    ReadReport,
    digests,
    longer_wins,
    read_demonstrations,
    read_preferences,
    read_process_steps,
    read_prompts,
    read_rankings,
    read_unpaired,
    split_by_group,
)
from rlhf_jax.data.rows import Demonstration, Preference, Prompt, Unpaired
from rlhf_jax.errors import InputError

GOOD = {"prompt": "Say hi.", "chosen": "Hi!", "rejected": "No."}


def _jsonl(path: pathlib.Path, *records) -> pathlib.Path:
    lines = b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records)
    path.write_bytes(gzip.compress(lines) if path.name.endswith(".gz") else lines)
    return path


def _real(folder: pathlib.Path, name: str) -> pathlib.Path:
    path = folder / name
    if not path.is_file():
        pytest.skip(f"real input missing: {path}")
    return path


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_prompt_chosen_rejected(tmp_path, name):
    path = _jsonl(tmp_path / name, GOOD, b"", {**GOOD, "prompt": " Ünïcode 猫 ", "chosen": " a\n", "more": 1})
    rows, report = read_preferences(path)
    assert rows == [
        Preference(prompt="Say hi.", chosen="Hi!", rejected="No.", source=f"{name}:1"),
        # The blank line counts as a line; responses lose the blanks around them, prompts do not.
        Preference(prompt=" Ünïcode 猫 ", chosen="a", rejected="No.", source=f"{name}:3"),
    ]
    assert report == ReadReport(kept=2, records=2)


def test_transcripts_split_at_the_last_shared_assistant_turn(tmp_path):
    shared = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    same_start = {"chosen": shared + " Sure, yes.", "rejected": shared + " Sure, no."}
    early = {
        "chosen": "\n\nHuman: q\n\nAssistant: one\n\nHuman: x\n\nAssistant: y",
        "rejected": "\n\nHuman: q\n\nAssistant: two\n\nHuman: z\n\nAssistant: w",
    }
    rows, _ = read_preferences(_jsonl(tmp_path / "hh.jsonl", same_start, early))
    assert (rows[0].prompt, rows[0].chosen, rows[0].rejected) == (shared, "Sure, yes.", "Sure, no.")
    assert rows[1].prompt == "\n\nHuman: q\n\nAssistant:"
    assert rows[1].chosen == "one\n\nHuman: x\n\nAssistant: y"
    assert rows[1].rejected == "two\n\nHuman: z\n\nAssistant: w"
    assert rows[0].group == ""


def test_argument_pairs_take_their_prompt_from_topic_and_stance(tmp_path):
    record = {"topic": "Cats", "stance": "for", "chosen": "They purr.", "rejected": "Eh.", "id": "7"}
    other = {**record, "prompt": "Own prompt", "id": "8"}
    rows, _ = read_preferences(_jsonl(tmp_path / "a.jsonl", record, other))
    assert rows[0].prompt == "Topic: Cats\nStance: for\nArgument:"
    assert rows[0].group == "Cats"
    assert (rows[1].prompt, rows[1].group) == ("Own prompt", "")


BAD_ROWS = [
    (b'{"prompt": "x", ', "is not JSON \\(Expecting property name"),
    (b"hello", "is not JSON \\(Expecting value at column 1\\)"),
    (b"\xff\xfe{}", "is not UTF-8 \\(byte 1 is 0xff\\)"),
    (b'{"prompt": "a\xc3", "chosen": "b", "rejected": "c"}', "is not UTF-8 \\(byte 14 is 0xc3\\)"),
    ([1, 2], "is a list where an object"),
    ("text", "is a string where an object"),
    (None, "is null where an object"),
    (3.5, "is a number where an object"),
    ({"prompt": "x", "chosen": "y"}, "has no field 'rejected' \\(its fields: 'prompt', 'chosen'\\)"),
    ({}, "has no field 'chosen' \\(its fields: none\\)"),
    ({**GOOD, "chosen": 3}, "has a number in 'chosen' where a string"),
    ({**GOOD, "rejected": None}, "has null in 'rejected' where a string"),
    ({**GOOD, "prompt": ["x"]}, "has a string in 'prompt\\[1\\]' where a message with role"),
    ({**GOOD, "chosen": True}, "has a truth value in 'chosen'"),
    ({**GOOD, "chosen": ""}, "has an empty 'chosen'"),
    ({**GOOD, "rejected": " \n\t"}, "has an empty 'rejected'"),
    ({**GOOD, "prompt": ""}, "has an empty 'prompt'"),
    ({**GOOD, "rejected": "Hi!"}, "has 'chosen' equal to 'rejected'"),
    ({**GOOD, "rejected": " Hi!\n"}, "equal to 'rejected' but for blanks"),
    (
        {"chosen": "yes", "rejected": "no"},
        "has no 'prompt', and its 'chosen' and 'rejected' share no beginning",
    ),
    (
        {"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"},
        "has nothing after the shared '.*' in 'chosen'",
    ),
    (b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', "half of a surrogate pair in 'prompt'"),
    (
        b'{"prompt": "a\\u0000b", "chosen": "c", "rejected": "d"}',
        "has a NUL character in 'prompt' \\(character 2\\)",
    ),
    (b'{"prompt": "a\0b"}', "is not JSON \\(a NUL byte at column 14\\)"),
    (b'{"prompt": "a"}\r{"prompt": "b"}', "holds several rows that end in .r alone"),
    (b'"' + b"x" * 10_000_000 + b'"', "has 10,000,003 bytes, more than the 4,194,304 that a row may have"),
    ({**GOOD, "votes_chosen": -1, "votes_rejected": 1}, "has -1 in 'votes_chosen' where a count"),
    ({**GOOD, "votes_chosen": "5", "votes_rejected": 1}, "has a string in 'votes_chosen' where a count"),
    (
        {**GOOD, "votes_chosen": 0, "votes_rejected": 0, "votes_equal": 3},
        "has no vote for either side \\(3 for neither",
    ),
    ({**GOOD, "votes_chosen": 3}, "has no field 'votes_rejected'"),
    (b"[" * 100_000, "is not JSON that can be read"),
    (b"1" * 5000, "is not JSON that can be read"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS, ids=[message[:34] for _, message in BAD_ROWS])
def test_a_bad_row_is_one_sentence_or_is_skipped_and_listed(tmp_path, bad, message):
    path = _jsonl(tmp_path / "pairs.jsonl", GOOD, GOOD, bad, {**GOOD, "prompt": "last"})
    with pytest.raises(InputError, match=message) as error:
        read_preferences(path)
    text = str(error.value)
    assert text.startswith(f"line 3 of {path} ")
    assert text.endswith(": mend it or pass --config.data.on_bad_row=skip.")
    assert "\n" not in text
    rows, report = read_preferences(path, on_bad_row="skip")
    assert [row.source for row in rows] == ["pairs.jsonl:1", "pairs.jsonl:2", "pairs.jsonl:4"]
    assert report.kept == 3
    [(source, reason)] = report.skipped
    assert source == "pairs.jsonl:3"
    assert reason in text


def test_an_id_that_comes_twice_names_both_rows(tmp_path):
    path = _jsonl(tmp_path / "a.jsonl", {**GOOD, "id": 7}, {**GOOD, "id": "7"}, {**GOOD, "id": 7})
    with pytest.raises(
        InputError, match="line 3 of .* has the id '7' that a.jsonl:1 has already: mend it or pass"
    ):
        read_preferences(path)
    _, report = read_preferences(path, on_bad_row="skip")
    assert (report.kept, report.records, [source for source, _ in report.skipped]) == (2, 3, ["a.jsonl:3"])


def test_an_id_of_a_bad_row_is_free_for_the_row_that_mends_it(tmp_path):
    path = _jsonl(tmp_path / "a.jsonl", {**GOOD, "id": 7, "chosen": ""}, {**GOOD, "id": 7}, {**GOOD, "id": 7})
    rows, report = read_preferences(path, on_bad_row="skip")
    assert [row.source for row in rows] == ["a.jsonl:2"]
    assert report.skipped[0] == ("a.jsonl:1", "has an empty 'chosen'")
    assert report.skipped[1] == ("a.jsonl:3", "has the id '7' that a.jsonl:2 has already")


def test_votes_that_are_tied_everywhere_prefer_nothing(tmp_path):
    tied = {**GOOD, "votes_chosen": 2, "votes_rejected": 2}
    with pytest.raises(
        InputError, match="all votes tied in every one of its 2 rows.*: give rows with a majority"
    ):
        read_preferences(_jsonl(tmp_path / "a.jsonl", tied, tied))
    rows, _ = read_preferences(_jsonl(tmp_path / "b.jsonl", tied, {**tied, "votes_chosen": 3}))
    assert [row.votes for row in rows] == [(2, 2, 0), (3, 2, 0)]


def test_line_ends_may_be_mixed(tmp_path):
    line = json.dumps(GOOD).encode()
    rows, _ = read_preferences(_write(tmp_path / "a.jsonl", line + b"\r\n" + line + b"\n\r\n" + line))
    assert [row.source for row in rows] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:4"]


def test_a_long_line_does_not_hide_the_next(tmp_path):
    lines = [b'"' + b"x" * 5_000_000 + b'"', json.dumps(GOOD).encode(), b"y" * 4_194_305]
    rows, report = read_preferences(_write(tmp_path / "a.jsonl", b"\n".join(lines)), on_bad_row="skip")
    assert [row.source for row in rows] == ["a.jsonl:2"]
    assert [source for source, _ in report.skipped] == ["a.jsonl:1", "a.jsonl:3"]


def test_a_directory_of_shards_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "in").mkdir()
    _jsonl(tmp_path / "in" / "b.jsonl.gz", {**GOOD, "prompt": "3"})
    _jsonl(tmp_path / "a.jsonl", {**GOOD, "prompt": "1"}, {**GOOD, "prompt": "2"})
    _write(tmp_path / "notes.md", b"not data")
    rows, _ = read_preferences(tmp_path)
    assert [(row.prompt, row.source) for row in rows] == [
        ("1", "a.jsonl:1"),
        ("2", "a.jsonl:2"),
        ("3", "in/b.jsonl.gz:1"),
    ]


def test_parquet_is_read_as_json_lines_are(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    turns = [{"role": "user", "content": "Say hi."}]
    records = [
        {
            "prompt": turns,
            "chosen": [{"role": "assistant", "content": f"Hi {i}!"}],
            "rejected": turns_of("No."),
        }
        for i in range(600)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    rows, report = read_preferences(tmp_path / "a.parquet")
    assert report == ReadReport(kept=600, records=600)
    assert rows[599] == Preference(
        prompt="\n\nuser: Say hi.\n\nassistant:",
        chosen="Hi 599!",
        rejected="No.",
        source="a.parquet:600",
        messages=(("user", "Say hi."),),
    )


def turns_of(text):
    return [{"role": "assistant", "content": text}]


def _write(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_bad_file_is_one_sentence_even_when_rows_may_be_skipped(tmp_path, on_bad_row):
    whole = gzip.compress("".join(json.dumps({**GOOD, "prompt": str(i)}) for i in range(500)).encode())
    cases = [
        (tmp_path / "absent.jsonl", "absent.jsonl does not exist: check the path"),
        (_write(tmp_path / "torn.parquet", b"PAR1 torn"), "torn.parquet is not a whole Parquet file"),
        (_write(tmp_path / "a.csv", b"x"), "a.csv is not of a kind"),
        (_write(tmp_path / "empty.jsonl", b""), "empty.jsonl has no rows: give a file with at least one"),
        (_write(tmp_path / "blank.jsonl", b"\n \n"), "blank.jsonl has no rows"),
        (_write(tmp_path / "empty.jsonl.gz", b""), "empty.jsonl.gz has no rows"),
        (_write(tmp_path / "cut.jsonl.gz", whole[:-20]), "cut.jsonl.gz is not a whole gzip file"),
        (_write(tmp_path / "head.jsonl.gz", whole[:5]), "head.jsonl.gz is not a whole gzip file"),
        (_write(tmp_path / "plain.jsonl.gz", b"{}\n"), "plain.jsonl.gz is not a whole gzip file"),
        (
            _write(tmp_path / "flip.jsonl.gz", whole[:-6] + b"\0\0" + whole[-4:]),
            "flip.jsonl.gz is not a whole gzip",
        ),
    ]
    (tmp_path / "dir.jsonl").mkdir()
    cases.append((tmp_path / "dir.jsonl", "dir.jsonl is a directory: give the path of a file in it"))
    for path, message in cases:
        with pytest.raises(InputError) as error:
            read_preferences(path, on_bad_row=on_bad_row)
        assert message in str(error.value)
        assert str(path) in str(error.value)


def test_a_file_without_one_good_row_says_why(tmp_path):
    path = _jsonl(tmp_path / "pairs.jsonl", {**GOOD, "chosen": ""}, b"x")
    with pytest.raises(InputError, match="all 2 were skipped, the first because it has an empty 'chosen'"):
        read_preferences(path, on_bad_row="skip")


def test_on_bad_row_is_one_of_two(tmp_path):
    with pytest.raises(InputError, match="on_bad_row is 'ignore': use 'error' or 'skip'"):
        read_preferences(_jsonl(tmp_path / "pairs.jsonl", GOOD), on_bad_row="ignore")


def test_demonstrations_in_their_three_dialects(tmp_path):
    records = [
        {"prompt": "p", "response": " r "},
        {"prompt": "p", "completion": "r", "context": "not part of a prompt row"},
        {"instruction": "i", "context": "c", "response": "r"},
        {"instruction": "i", "input": "", "output": "r", "category": "qa"},
    ]
    expected = [("p", "r"), ("p", "r"), ("i\n\nc", "r"), ("i", "r")]
    lines, _ = read_demonstrations(_jsonl(tmp_path / "d.jsonl", *records))
    assert [(row.prompt, row.response) for row in lines] == expected
    assert lines[2] == Demonstration(prompt="i\n\nc", response="r", source="d.jsonl:3")
    whole, _ = read_demonstrations(_write(tmp_path / "d.json", json.dumps(records).encode()))
    assert [(row.prompt, row.response) for row in whole] == expected
    assert whole[3].source == "d.json:4"


def test_bad_demonstrations(tmp_path):
    cases = [
        (b'[{"prompt": "p", "response": "r"}, {"prompt": "p"}]', "row 2 of .*d.json has no field 'response'"),
        (b'[{"prompt": "p", "response": ""}]', "row 1 of .*d.json has an empty 'response'"),
        (b'[{"response": "r"}]', "row 1 of .*d.json has no field 'prompt'"),
        (b'[{"instruction": "i", "context": 3, "response": "r"}]', "has a number in 'context'"),
        (b'{"prompt": "p"}', "d.json holds an object where a list of rows is expected: wrap the rows in"),
        (b"[", "d.json is not JSON .*: give a JSON list of rows"),
        (b"[]", "d.json has no rows"),
        (b"", "d.json has no rows"),
        (b"[\xff]", "d.json is not UTF-8"),
    ]
    for data, message in cases:
        with pytest.raises(InputError, match=message):
            read_demonstrations(_write(tmp_path / "d.json", data))


def test_prompts_from_lines_and_from_json(tmp_path):
    rows, _ = read_prompts(_write(tmp_path / "p.txt", b"\xef\xbb\xbffirst\r\n\n  second \n"))
    assert rows == [
        Prompt(prompt="first", source="p.txt:1"),
        Prompt(prompt="  second ", source="p.txt:3"),
    ]
    rows, _ = read_prompts(_jsonl(tmp_path / "p.jsonl", {"prompt": "a"}, "b"))
    assert [row.prompt for row in rows] == ["a", "b"]
    with pytest.raises(InputError, match="line 2 of .*p.txt is not UTF-8"):
        read_prompts(_write(tmp_path / "p.txt", b"ok\n\xe9\n"))
    with pytest.raises(InputError, match="line 1 of .*p.jsonl has an empty 'prompt'"):
        read_prompts(_jsonl(tmp_path / "p.jsonl", " "))


_json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_texts = st.text(max_size=12) | st.sampled_from(["\n\nHuman: q\n\nAssistant:", "\n\nAssistant: a", "\ud800"])
_turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": _texts}), max_size=3
)
_trees = st.recursive(
    st.fixed_dictionaries({"text": _texts, "mc_value": st.floats(-0.5, 1.5)}),
    lambda inner: st.fixed_dictionaries(
        {"text": _texts, "mc_value": st.floats(0, 1), "children": st.lists(inner)}
    ),
    max_leaves=4,
)
_records = st.dictionaries(
    st.sampled_from(
        [
            "prompt",
            "chosen",
            "rejected",
            "topic",
            "stance",
            "instruction",
            "response",
            "input",
            "id",
            "messages",
        ]
        + ["completion", "completions", "label", "labels", "ranks", "question", "answer", "votes_chosen"]
        + [
            "votes_rejected",
            "prediction 1",
            "prediction 2",
            "preference",
            "reasoning_steps",
            "feedback",
            "text",
        ]
    ),
    _texts | _json_values | _turns | _trees,
    max_size=8,
).map(lambda record: json.dumps(record).encode())
READERS = (
    read_preferences,
    read_demonstrations,
    read_prompts,
    read_rankings,
    read_process_steps,
    read_unpaired,
)
_lines = st.binary(max_size=40) | _records | _json_values.map(lambda value: json.dumps(value).encode())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(_lines, max_size=5),
    name=st.sampled_from(["f.jsonl", "f.jsonl.gz", "f.json", "f.txt"]),
    cut=st.none() | st.integers(0, 60),
    on_bad_row=st.sampled_from(["error", "skip"]),
)
def test_whatever_the_bytes_only_rows_or_an_input_error(tmp_path, lines, name, cut, on_bad_row):
    data = b"\n".join(lines)
    data = gzip.compress(data) if name.endswith(".gz") else data
    path = _write(tmp_path / name, data[:cut])
    for read in READERS:
        try:
            rows, report = read(path, on_bad_row=on_bad_row)
        except InputError as error:
            assert str(path) in str(error)
            continue
        assert report.kept == len(rows) > 0
        assert report.records == len({row.source.split("/")[0] for row in rows}) + len(report.skipped)
        assert on_bad_row == "skip" or not report.skipped
        sources = [row.source for row in rows] + [source for source, _ in report.skipped]
        assert len(set(sources)) == len(sources)
        for row in rows:
            assert row.prompt.strip() or isinstance(row, Unpaired)
            if isinstance(row, Preference):
                assert row.chosen.strip() and row.rejected.strip() and row.chosen != row.rejected


def _pair(group, prompt="p", chosen="c", rejected="r"):
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected, source="s", group=group)


@settings(max_examples=100, deadline=None)
@given(
    groups=st.lists(st.integers(0, 9), min_size=2, max_size=60).filter(lambda groups: len(set(groups)) > 1),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
    by_prompt=st.booleans(),
)
def test_no_group_is_divided(groups, fraction, seed, by_prompt):
    rows = [
        _pair("", prompt=f"g{group}", chosen=str(i)) if by_prompt else _pair(f"g{group}", chosen=str(i))
        for i, group in enumerate(groups)
    ]
    train, held_out = split_by_group(rows, held_out_fraction=fraction, seed=seed)
    key = (lambda row: row.prompt) if by_prompt else (lambda row: row.group)
    assert not {key(row) for row in train} & {key(row) for row in held_out}
    assert sorted(train + held_out, key=lambda row: int(row.chosen)) == rows
    assert train and held_out
    # As much as was asked for, unless one group only is left to train on, and no whole group more than that.
    assert len(held_out) >= fraction * len(rows) or len({key(row) for row in train}) == 1
    largest = max(sum(key(row) == group for row in held_out) for group in {key(row) for row in held_out})
    assert len(held_out) - largest < fraction * len(rows)
    assert split_by_group(rows, held_out_fraction=fraction, seed=seed) == (train, held_out)


def test_splits_depend_on_the_seed_and_refuse_what_cannot_be():
    rows = [_pair(f"g{i % 10}", chosen=str(i)) for i in range(100)]
    splits = {
        tuple(r.group for r in split_by_group(rows, held_out_fraction=0.3, seed=s)[1]) for s in range(8)
    }
    assert len(splits) > 4
    assert {len(split) for split in splits} == {30}
    assert split_by_group(rows, held_out_fraction=0.0, seed=0) == (rows, [])
    with pytest.raises(InputError, match="held_out_fraction is 1.0"):
        split_by_group(rows, held_out_fraction=1.0, seed=0)
    with pytest.raises(InputError, match="form 1 group"):
        split_by_group(rows[:1], held_out_fraction=0.5, seed=0)


def test_the_name_of_a_group_alone_gives_it_its_place_in_line():
    """Whatever the order of rows; and rows that come later move what is held out by no more than they must."""
    rows = [_pair(f"g{i % 50}", chosen=str(i)) for i in range(200)]
    held_out = {row.group for row in split_by_group(rows, held_out_fraction=0.2, seed=1)[1]}
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(200)]
    assert {row.group for row in split_by_group(shuffled, held_out_fraction=0.2, seed=1)[1]} == held_out
    more = rows + [_pair(f"g{50 + i}", chosen=str(i)) for i in range(20)]
    after = {row.group for row in split_by_group(more, held_out_fraction=0.2, seed=1)[1]}
    kept = {group for group in after if int(group[1:]) < 50}
    assert kept <= held_out or held_out <= kept
    assert len(kept ^ held_out) <= 5
    # The digests are a promise to sets prepared long ago: BLAKE2b of the text, eight bytes, little end first.
    expected = int.from_bytes(hashlib.blake2b("Ünïcode".encode(), digest_size=8).digest(), "little")
    assert digests(["x", "Ünïcode"]).tolist()[1] == expected


def test_demonstrations_are_split_by_prompt():
    rows = [Demonstration(prompt=f"p{i % 5}", response=str(i), source="s") for i in range(20)]
    train, held_out = split_by_group(rows, held_out_fraction=0.2, seed=3)
    assert (len(train), len(held_out)) == (16, 4)
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}


def test_longer_wins_by_hand():
    rows = [
        _pair("", chosen="long", rejected="x"),
        _pair("", chosen="a", rejected="b"),
        _pair("", chosen="", rejected="b"),
        _pair("", chosen="abc", rejected="b"),
    ]
    assert longer_wins(rows) == (1 + 0.5 + 0 + 1) / 4
    with pytest.raises(InputError, match="no rows"):
        longer_wins([])


# What the folder's README says of each file: kind, records, and records that are refused.
REAL = [
    ("preferences/hh_harmless_base_test.jsonl.gz", read_preferences, 2312, 4),
    ("preferences/ukp_convarg1_strict_pairs.jsonl.gz", read_preferences, 11_642, 0),
    ("preferences/fgrlhf_qa_dev_feedback.json.gz", read_rankings, 500, 12),
    ("preferences/fgrlhf_qa_dev_feedback.json.gz", read_process_steps, 500, 0),
    ("demonstrations/dolly_3k.json", read_demonstrations, 2996, 0),
    ("demonstrations/self_instruct_seed_tasks.jsonl", read_demonstrations, 175, 0),
    ("math/gsm8k_train.jsonl.gz", read_demonstrations, 7473, 0),
    ("math/gsm8k_test.jsonl.gz", read_prompts, 1319, 0),
    ("math/openr_game24_train_dedup.jsonl.gz", read_prompts, 1000, 0),
    ("math/openr_game24_train_dedup.jsonl.gz", read_unpaired, 1000, 0),
    ("math/openr_samples_prm800k.jsonl", read_process_steps, 6, 0),
    ("math/openr_samples_math-shepherd.jsonl", read_process_steps, 7, 0),
    ("math/openr_samples_math-aps.jsonl", read_process_steps, 3, 0),
    ("math/openr_samples_math-aps-tree.jsonl", read_process_steps, 3, 0),
    ("sentiment/rt-polarity.pos", read_unpaired, 5331, 0),
    ("sentiment/rt-polarity.neg", read_unpaired, 5331, 0),
]


@pytest.mark.parametrize(
    ("name", "read", "records", "refused"), REAL, ids=[f"{r[0]}-{r[1].__name__}" for r in REAL]
)
def test_real_files_have_the_rows_that_their_readme_says(shared_data, name, read, records, refused):
    rows, report = read(_real(shared_data, name), on_bad_row="skip")
    assert (report.records, len(report.skipped)) == (records, refused)
    assert len(rows) == report.kept >= records - refused
    assert len({row.source for row in rows}) == len(rows)


def test_real_transcripts(shared_data):
    path = _real(shared_data, "preferences/hh_harmless_base_test.jsonl.gz")
    with pytest.raises(InputError, match="line 87 of .* has nothing after the shared"):
        read_preferences(path)
    rows, report = read_preferences(path, on_bad_row="skip")
    assert report.kept + len(report.skipped) == 2312
    assert [source.rpartition(":")[2] for source, _ in report.skipped] == ["87", "517", "926", "1104"]
    assert all(row.prompt.startswith("\n\nHuman:") and row.prompt.endswith("\n\nAssistant:") for row in rows)
    assert longer_wins(rows) == pytest.approx(0.446, abs=0.001)


def test_real_argument_pairs(shared_data):
    path = _real(shared_data, "preferences/ukp_convarg1_strict_pairs.jsonl.gz")
    rows, report = read_preferences(path)
    assert (len(rows), report.skipped) == (11_642, ())
    assert len({row.prompt for row in rows}) == 32
    assert len({row.group for row in rows}) == 16
    assert longer_wins(rows) == pytest.approx(0.77, abs=0.005)
    train, held_out = split_by_group(rows, held_out_fraction=0.2, seed=0)
    texts = [{text for row in side for text in (row.chosen, row.rejected)} for side in (train, held_out)]
    assert len(texts[0] | texts[1]) == 1038
    assert not texts[0] & texts[1]


def test_real_demonstrations(shared_data):
    rows, report = read_demonstrations(_real(shared_data, "demonstrations/dolly_3k.json"))
    assert (len(rows), report.skipped) == (2996, ())
    assert rows[0].prompt == "How do I start running?"
    assert rows[0].response.startswith("Make sure you get comfortable running shoes")
