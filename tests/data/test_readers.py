"""Files become rows or one clear sentence; groups are never divided."""

import gzip
import json
import pathlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_jax.data.readers import (
    ReadReport,
    longer_wins,
    read_demonstrations,
    read_preferences,
    read_prompts,
    split_by_group,
)
from rlhf_jax.data.rows import Demonstration, Preference, Prompt
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
    assert report == ReadReport(kept=2, skipped=())


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
    rows, _ = read_preferences(_jsonl(tmp_path / "a.jsonl", record, {**record, "prompt": "Own prompt"}))
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
    ({**GOOD, "prompt": ["x"]}, "has a list in 'prompt' where a string"),
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


def _write(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_bad_file_is_one_sentence_even_when_rows_may_be_skipped(tmp_path, on_bad_row):
    whole = gzip.compress("".join(json.dumps({**GOOD, "prompt": str(i)}) for i in range(500)).encode())
    cases = [
        (tmp_path / "absent.jsonl", "absent.jsonl does not exist: check the path"),
        (tmp_path, "is not of a kind that is read here: give a file ending in .jsonl"),
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
_records = st.dictionaries(
    st.sampled_from(["prompt", "chosen", "rejected", "topic", "stance", "instruction", "response", "input"]),
    _texts | _json_values,
    max_size=8,
).map(lambda record: json.dumps(record).encode())
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
    for read in (read_preferences, read_demonstrations, read_prompts):
        try:
            rows, report = read(path, on_bad_row=on_bad_row)
        except InputError as error:
            assert str(path) in str(error)
            continue
        assert report.kept == len(rows) > 0
        assert on_bad_row == "skip" or not report.skipped
        sources = [row.source for row in rows] + [source for source, _ in report.skipped]
        assert len(set(sources)) == len(sources)
        for row in rows:
            assert row.prompt.strip()
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
