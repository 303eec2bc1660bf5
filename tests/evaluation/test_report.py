"""The page shows the numbers of the files, obeys no text, asks for nothing from outside, and says what is missing."""

import dataclasses
import html.parser
import json
import re
import shutil

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.evaluation.report import write_report

VOID = {"meta", "br", "link", "img", "input", "hr", "path", "use"}


class Page(html.parser.HTMLParser):
    """Everything that the tests ask of a page, read by a parser that is not a browser but as strict as we need."""

    def __init__(self, source: str):
        super().__init__()
        self.source, self.tags, self.ids, self.links, self.handlers = source, [], [], [], []
        self.rows, self.open, self.texts = [], [], []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[name] for name in ("href", "src", "xlink:href", "action") if name in values]
        self.handlers += [name for name in values if name.startswith("on")]
        if tag == "tr":
            self.rows.append(("", []))
        if tag == "data" and "tr" in self.open:
            self.rows[-1][1].append(values["value"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)
        if "tr" in self.open and "th" in self.open:
            self.rows[-1] = (self.rows[-1][0] + data, self.rows[-1][1])

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))


def page_of(workdir) -> Page:
    path = write_report(workdir)
    assert path == workdir / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def edit(path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def strip_gold(ladder) -> None:
    """What the files look like on real data: no gold, no ceiling."""

    def without(summary):
        del summary["reward_model"]["bayes_accuracy"]
        for values in summary["policies"].values():
            del values["gold"], values["gold_std"]

    edit(ladder / "summary.json", without)
    for path in ladder.glob("*/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{name: value for name, value in row.items() if "gold" not in name} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    edit(
        ladder / "evaluate" / "samples.json",
        lambda found: [s.update(gold=None) for v in found.values() for s in v],
    )


def test_the_table_holds_the_numbers_of_the_summary_to_the_last_digit(ladder):
    policies = json.loads((ladder / "summary.json").read_text())["policies"]
    rows = page_of(ladder).rows
    labels = {
        "sft": "SFT",
        "ppo": "PPO",
        "ppo_no_leash": "PPO, no leash",
        "dpo": "DPO",
        "best_of_n": "Best of 16",
    }
    for name, label in labels.items():
        found = [values for head, values in rows if head.lstrip("●▲▼■◆") == label]
        keys = ("proxy", "gold", "kl", "length", "distinct_2", "terminated")
        assert found == [[repr(policies[name][key]) for key in keys]]


def test_the_words_are_worked_by_hand(ladder):
    text = page_of(ladder).text
    # From 1 to 3 and to 0: of 2 gained, 3 lost; the proxy went from 1.25 to 2.75 meanwhile.
    assert (
        "Gold rose from 1.00 to 3.00 (step 10, KL 4.0 nats), then fell to 0.00 at KL 25.0 nats: 150%" in text
    )
    assert "it ended worse than it had begun. Meanwhile the proxy rose from 1.25 to 2.75." in text
    assert "Gold rose from 1.00 to 3.00 (step 20, KL 4.0 nats), its highest at the last evaluation" in text
    # 2 points over SFT, whose gold has a standard deviation of 2.
    assert "+2.00 gold" in text and "by PPO over SFT, +1.0 standard deviations" in text
    assert "81.2%reward-model accuracy of a possible 82.8%" in text
    assert "150%of the gold gained is lost again once the leash is cut" in text
    assert "in 81.2% of 4 pairs it had not seen" in text
    assert (
        "better than 82.8% on average, because labels are noisy: it is 1.6 points below that ceiling" in text
    )
    assert "the longer reply is right in 70.3%, 10.9 points less" in text
    assert "On average it is off by 1.6 points" in text
    assert "75 s in all" in text and "beta 0.05" in text and "embedded film-review world, seed 7" in text
    assert "Last value 0.1667, held out 0.1875" in text  # 5 / 30
    assert "rlhf_jax 9.8.7" in text


def test_samples_stand_side_by_side_in_the_order_of_the_table(ladder):
    text = page_of(ladder).text
    first = text.index("praise the music", text.index("What they say"))
    places = [
        text.index(f"{name} answers praise the music", first)
        for name in ("sft", "ppo", "ppo_no_leash", "dpo")
    ]
    assert places == sorted(places)
    assert places[-1] < text.index("sft answers blame the plot")
    assert text.count("9 tokens, cut off") == 2  # the two of the policy without a leash


@pytest.mark.parametrize("name", [".", "ppo", "reward_model", "sft", "evaluate"])
def test_nothing_is_asked_from_outside_and_nothing_runs(ladder, name):
    page = page_of(ladder / name)
    assert not {"script", "link", "iframe", "img", "object", "embed", "base", "form"} & set(page.tags)
    assert not page.handlers
    for forbidden in ("http", "src=", "@import", "javascript", "xlink", "data:"):
        assert forbidden not in page.source
    references = page.links + [f"#{name}" for name in re.findall(r"url\(#([^)]*)\)", page.source)]
    assert len(re.findall(r"url\(", page.source)) == len(re.findall(r"url\(#", page.source))
    assert len(page.ids) == len(set(page.ids))
    assert references or name == "evaluate"
    for reference in references:
        assert reference.startswith("#") and reference[1:] in page.ids


def test_hostile_text_is_shown_and_not_obeyed(ladder):
    attack = '</p><script>alert("1")</script><img src=x onerror=alert(1)>&amp;\'"'

    def poison(samples):
        samples["ppo"][0]["prompt"] = samples["sft"][0]["prompt"] = attack
        samples["ppo"][0]["response"] = attack

    def poison_summary(summary):
        summary["policies"][attack] = dict(summary["policies"]["dpo"], proxy=attack)

    edit(ladder / "evaluate" / "samples.json", poison)
    edit(ladder / "summary.json", poison_summary)
    edit(ladder / "sft" / "data.json", lambda data: data["unreadable"].append([attack, attack]))
    edit(ladder / "sft" / "config.json", lambda config: config["config"]["data"].update(path=attack))
    edit(ladder / "ppo" / "handoff" / "handoff.json", lambda handoff: handoff.update(code_version=attack))
    rows = ladder / "sft" / "metrics.jsonl"
    rows.write_text(rows.read_text().replace('"nll"', json.dumps(attack)))
    for workdir in (ladder, ladder / "sft"):
        page = page_of(workdir)
        assert not {"script", "img"} & set(page.tags) and not page.handlers
        assert attack in page.text


def test_real_data_has_neither_gold_nor_a_ceiling(ladder):
    strip_gold(ladder)
    page = page_of(ladder)
    assert "no gold reward" in page.text
    for absent in ("Goodhart", "ceiling", "None", "nan"):
        assert absent not in page.text
    assert 'id="distance"' in page.source and 'aria-label="Gold' not in page.source
    assert "-0.50 → 0.75" in page.text


def test_what_is_missing_leaves_its_part_out(ladder):
    shutil.rmtree(ladder / "evaluate")
    shutil.rmtree(ladder / "ppo_no_leash")
    shutil.rmtree(ladder / "ppo" / "handoff")
    (ladder / "reward_model" / "margins.json").unlink()
    for path in ladder.glob("*/data.json"):
        path.unlink()
    edit(ladder / "summary.json", lambda summary: summary.pop("seconds"))
    edit(ladder / "summary.json", lambda summary: summary["reward_model"].clear())
    page = page_of(ladder)
    assert 'id="policies"' in page.source and 'id="distance"' in page.source
    for anchor in ("samples", "data", "reward-model"):
        assert f'id="{anchor}"' not in page.source and f'href="#{anchor}"' not in page.source
    assert "in all" not in page.text


def test_rows_left_out_are_counted_and_the_first_are_named(ladder):
    cut = [[f"pairs.jsonl:{n}", "has a prompt of 700 tokens"] for n in range(8)]

    def leave_out(data):
        data["train"] |= {"truncated": cut, "repeated": 12}
        data["unreadable"] = [["pairs.jsonl:99", "is not JSON"]]

    edit(ladder / "dpo" / "data.json", leave_out)
    page = page_of(ladder)
    assert ["3687", "12", "0", "8", "1"] in [values for head, values in page.rows if head == "dpo, train"]
    assert "pairs.jsonl:4 has a prompt of 700 tokens" in page.text
    assert "pairs.jsonl:5" not in page.text and "and 3 more in data.json" in page.text
    assert "pairs.jsonl:99 is not JSON" in page.text


@pytest.mark.parametrize(
    "missing", ["summary.json", "ppo/metrics.jsonl", "sft/metrics.jsonl", "evaluate/summary.json"]
)
def test_a_missing_file_is_named(ladder, missing):
    (ladder / missing).unlink()
    with pytest.raises(InputError, match=re.escape(str(ladder / missing)) + " is missing"):
        write_report(ladder)
    assert not (ladder / "report.html").exists()


@pytest.mark.parametrize(
    "damaged", ["summary.json", "ppo/config.json", "dpo/data.json", "reward_model/margins.json"]
)
def test_a_damaged_file_is_named(ladder, damaged):
    path = ladder / damaged
    path.write_text(path.read_text()[:-3])
    with pytest.raises(InputError, match=re.escape(str(path)) + " is damaged"):
        write_report(ladder)


def test_a_damaged_line_of_metrics_is_an_error_and_a_torn_last_one_is_not(ladder):
    path = ladder / "sft" / "metrics.jsonl"
    before = page_of(ladder).source
    path.write_text(path.read_text() + '{"step": 31, "los')
    assert page_of(ladder).source == before
    path.write_text("{oops}\n" + path.read_text())
    with pytest.raises(InputError, match=re.escape(str(path)) + " is damaged"):
        write_report(ladder)
    path.write_text("")
    with pytest.raises(InputError, match="has no rows"):
        write_report(ladder)


def test_a_directory_without_runs_or_policies_is_refused(ladder, tmp_path):
    with pytest.raises(InputError, match="nowhere/summary.json is missing"):
        write_report(tmp_path / "nowhere")
    edit(ladder / "summary.json", lambda summary: summary["policies"].clear())
    with pytest.raises(InputError, match="has no policies"):
        write_report(ladder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "summary.json").write_text('{"policies": {"sft": {"proxy": 1.0}}}')
    with pytest.raises(InputError, match="holds no run"):
        write_report(tmp_path / "empty")


def test_an_exported_model_beside_the_runs_is_no_run(ladder):
    before = page_of(ladder).source
    (ladder / "exported").mkdir()
    (ladder / "exported" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert page_of(ladder).source == before


def test_the_same_files_give_the_same_page(ladder):
    first = write_report(ladder).read_bytes()
    assert write_report(ladder).read_bytes() == first
    assert not list(ladder.glob("*.partial"))


def test_a_single_run_shows_every_metric(ladder):
    page = page_of(ladder / "ppo")
    for title in ("proxy", "gold", "kl", "length", "loss", "loss/policy", "loss/value"):
        assert f"<h3>{title}</h3>" in page.source
    last = {head: values for head, values in page.rows}
    assert last["loss/value"] == ["2.0", "0.1", "0"]  # 2 / 1, 2 / 20, none that is not finite
    assert last["eval/gold"] == ["1.0", "3.0", "0"]
    assert "step 20 of 20 · finished" in page.text


def test_an_unfinished_run_with_a_gradient_that_burst(ladder):
    shutil.rmtree(ladder / "dpo" / "handoff")
    rows = (ladder / "dpo" / "metrics.jsonl").read_text().splitlines()
    rows[3] = '{"step": 4, "loss": NaN, "accuracy": Infinity}'
    (ladder / "dpo" / "metrics.jsonl").write_text("\n".join(rows[:10]) + "\n")
    page = page_of(ladder / "dpo")
    assert "step 10 of 30 · not finished" in page.text
    assert {head: values for head, values in page.rows}["loss"] == ["0.74", "0.65", "1"]


def test_an_evaluation_alone_has_its_table_and_samples(ladder):
    page = page_of(ladder / "evaluate")
    assert [values[0] for head, values in page.rows if head == "▲PPO"] == ["0.7512345"]
    assert "dpo answers blame the plot" in page.text
    (ladder / "evaluate" / "samples.json").unlink()
    assert "blame the plot" not in page_of(ladder / "evaluate").text


def test_a_run_says_which_embedded_task_it_is_of_and_no_directory_of_this_machine():
    from rlhf_jax.evaluation import report_parts
    from rlhf_jax.evaluation.report_files import Run

    def told(data, model=""):
        config = {"data": data, "model": {"path": model}}
        fields = {"name": "sft", "stage": "sft", "config": config, "handoff": {}, "rows": []}
        known = {field.name for field in dataclasses.fields(Run)}
        rest = {name: {} for name in known - set(fields)}
        return report_parts.origin({"sft": Run(**fields, **rest)})

    sums = {
        "path": "",
        "embedded": "arithmetic",
        "arithmetic": {"num_digits": 3, "seed": 4, "slip_rate": 0.3},
    }
    assert told(sums) == ["embedded arithmetic of 3 digits, seed 4, slip rate 0.3"]
    assert told({"path": "/home/me/pairs.jsonl"}, "/home/me/llama") == [
        "data pairs.jsonl",
        "started from llama",
    ]


def test_a_run_that_left_its_best_policy_says_which(ladder):
    edit(
        ladder / "ppo" / "handoff" / "handoff.json",
        lambda handoff: handoff["facts"].update(best_iteration=12),
    )
    page = Page(write_report(ladder / "ppo").read_text())
    assert "finished · leaves the policy of iteration 12, the best by what ended the run" in page.text
