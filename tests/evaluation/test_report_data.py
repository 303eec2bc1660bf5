"""The data report: what a person reads in the terminal and on the page, and that the real files say what they are."""

import html.parser
import re

import pytest

from rlhf_jax.data.readers import read_preferences
from rlhf_jax.data.rows import Preference
from rlhf_jax.evaluation.report_data import data_page, examine, summary, write_data_report


def _rows():
    made = [
        Preference(
            prompt=f"p{i % 4}", chosen="c" * (i + 2), rejected=f"r{i}", source=f"a:{i}", votes=(3, 1, 1)
        )
        for i in range(12)
    ]
    turned = Preference(prompt="p0", chosen="r0", rejected="cc", source="<b>:9")
    return [*made, turned]


def test_the_printed_lines():
    found = examine({"all": _rows()}, left_out=[("a:99", "has an empty 'chosen'")], held_out_fraction=0.25)
    lines = "\n".join(summary(found))
    assert "pairs          13 all; 1 records left out\n  a:99 has an empty 'chosen'" in lines
    assert "contradictions 1 of 12 different pairs are labelled both ways; 1 rows repeat a pair" in lines
    assert "  a:0, <b>:9" in lines
    assert "no scalar reward agrees with more than 92.3% of the labels" in lines
    assert "two annotators agree on" in lines
    assert re.search("25% held out by group: of [467] rows 0 share a prompt, 0 a group", lines)


def test_without_votes_the_ceiling_is_not_made_up():
    rows = [Preference(prompt="p", chosen="a", rejected=f"b{i}", source=str(i)) for i in range(3)]
    lines = summary(examine({"all": rows}))
    assert "agreement      not known: no pair was judged by several annotators" in lines
    assert "ceiling        not known without agreement; at most 100.0% of these labels" in lines
    assert not any("held out by group" in line for line in lines)  # one prompt cannot be divided
    known = [Preference(prompt="p", chosen="a", rejected="b", source="s", probability=p) for p in (0.6, 0.2)]
    assert any(
        "70.0% of the labels, by their known probabilities" in line for line in summary(examine({"a": known}))
    )


def test_splits_that_were_given_are_compared_with_the_first():
    found = examine({"train": _rows(), "test": _rows()[:3]})
    [(name, leak)] = found.leaks
    assert (name, leak.rows, leak.pairs) == ("test with train", 3, 3)


def test_labels_by_several_objectives():
    """Of the second a tie, one for the rejected and longer side, one for the chosen and longer side; and no label."""
    pairs = (
        ("long", "s", ()),
        ("s", "long", (("safe", 0.25),)),
        ("long", "s", (("safe", 1.0),)),
        ("a", "b", ()),
    )
    rows = [
        Preference(prompt="p", chosen=chosen, rejected=rejected, source="s", labels=(("good", 1.0), *more))
        for chosen, rejected, more in pairs
    ]
    rows.append(Preference(prompt="p", chosen="c", rejected="d", source="s", labels=(("safe", 0.5),)))
    found = examine({"all": rows})
    lines = "\n".join(summary(found))
    assert (
        "by good: 4 pairs, 0 of them ties; 100.0% for the chosen response, 62.5% for the longer one" in lines
    )
    assert (
        "by safe: 3 pairs, 1 of them ties; 50.0% for the chosen response, 100.0% for the longer one" in lines
    )
    assert re.search(r"Labels by objectives.*safe.*50\.0%.*100\.0%", data_page("t", found), re.DOTALL)
    assert "Labels by objectives" not in data_page("t", examine({"all": _rows()}))


class _Checker(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], set(), []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag not in ("meta", "path", "use", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_escaped_and_the_same_every_time(tmp_path):
    found = examine({"all": _rows()}, left_out=[("<script>x", "is <i>bad")])
    path = write_data_report(tmp_path / "new", "pairs & more", found)
    written = path.read_text()
    assert written == data_page("pairs & more", found)
    checker = _Checker()
    checker.feed(written)
    assert not checker.open
    assert {"svg", "table", "h1"} <= checker.seen and not {"script", "i"} & checker.seen
    text = " ".join(checker.text)
    assert "pairs & more" in text and "<script>x" in text and "is <i>bad" in text
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]


def test_argument_pairs_with_their_votes(shared_data):
    path = shared_data / "preferences" / "ukp_convarg1_strict_pairs.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"real input missing: {path}")
    rows, _ = read_preferences(path)
    found = examine({"all": rows})
    assert found.longer_wins == pytest.approx(0.773, abs=0.001)
    assert (len(found.consistency.contradicted), found.consistency.cyclic_prompts) == (12, 3)
    assert found.agreement.two_agree == pytest.approx(0.781, abs=0.001)
    assert found.agreement.labels == pytest.approx(0.903, abs=0.002)
    by_group, by_row = (leak for _, leak in found.leaks)
    assert (by_group.prompts, by_group.responses) == (0, 0)
    assert by_row.responses == by_row.rows == 1165
