"""Whatever is wrong with what a person gives: one sentence that names it, before training, and nothing is lost."""

import gzip
import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from ml_collections import config_flags

from experiments.configs import sft as sft_config
from experiments.launch import to_config_dict
from rlhf_jax import checkpoints
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.data import world
from rlhf_jax.errors import InputError
from rlhf_jax.evaluation import report
from rlhf_jax.models import decoder, huggingface
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.stages import config as configs
from rlhf_jax.stages import evaluate, online, ppo, reward_model, sft
from rlhf_jax.stages.inputs import DataConfig
from rlhf_jax.training.interrupt import Interrupted, StopRequest
from rlhf_jax.training.loop import Schedule

from ..stages.conftest import StopAfter
from .test_command_line import start

STOP = StopRequest()
ROWS = [
    {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
    for row in world.preferences(world.WorldConfig(num_preferences=40), "train")
]
GOOD = [json.dumps(row).encode() for row in ROWS]
LONG = ROWS[0] | {"prompt": "the " * 20 + "plot"}
SHAPE = ModelConfig(
    vocab_size=len(world.world_tokenizer()),
    width=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_width=8,
    max_length=64,
)


@pytest.fixture(scope="session")
def params():
    return decoder.init_params(SHAPE, jax.random.key(0))


@pytest.fixture(scope="session")
def pristine(params, tmp_path_factory) -> pathlib.Path:
    """A tiny model in Hugging Face's layout."""
    path = tmp_path_factory.mktemp("hub") / "tiny"
    huggingface.save_pretrained(path, SHAPE, params)
    world.world_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def model(pristine, tmp_path) -> pathlib.Path:
    """A copy that a test may spoil."""
    return shutil.copytree(pristine, tmp_path / "tiny")


def another_tokenizer():
    tokenizer = world.world_tokenizer()
    tokenizer.add_tokens(["zebra", "yak"])
    return tokenizer


def leave_run(workdir: pathlib.Path, params, *, tokenizer=None, head: bool = False) -> str:
    """A finished run, without having run it."""
    tokenizer = tokenizer or world.world_tokenizer()
    if head:
        params = params | {"head": {"kernel": jnp.ones(SHAPE.width), "bias": jnp.zeros(())}}
    handoff = checkpoints.Handoff(
        stage="reward_model" if head else "sft",
        model=SHAPE.to_dict(),
        tokenizer_fingerprint=tokenizers.fingerprint(tokenizer),
        config={},
        made_from=[],
        facts={"reward_offset": 0.0} if head else {},
        code_version="0",
    )
    checkpoints.save_handoff(
        workdir, handoff, params, lambda path: tokenizers.save_tokenizer(tokenizer, path)
    )
    return str(workdir)


def data(path, **changes) -> DataConfig:
    return DataConfig(path=str(path), response_length=48, **changes)


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def refused(run, workdir: pathlib.Path, message: str) -> None:
    """``run()`` is refused in one sentence, before training, and leaves every file beside the workdir as it is."""
    before = {
        path: text for path, text in contents(workdir.parent).items() if not path.startswith(f"{workdir}/")
    }
    with pytest.raises(InputError, match=message) as caught:
        run()
    assert "\n" not in str(caught.value)
    assert not (workdir / "metrics.jsonl").exists() and not (workdir / "checkpoints").exists()
    after = {
        path: text for path, text in contents(workdir.parent).items() if not path.startswith(f"{workdir}/")
    }
    assert after == before


def start_sft(model, workdir, path, **changes) -> None:
    config = sft.Config(
        model=sft.ModelSource(path=str(model)),
        data=data(path, **changes),
        schedule=Schedule(num_steps=1),
        batch_size=8,
    )
    sft.run(config, workdir, stop=STOP)


def line(**changes) -> bytes:
    return json.dumps(
        {name: value for name, value in (ROWS[1] | changes).items() if value is not None}
    ).encode()


MEND = ": mend it or pass --config.data.on_bad_row=skip"


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("a.jsonl", [GOOD[0], b'{"prompt": "x", '], rf"line 2 of .*a\.jsonl is not JSON .*{MEND}"),
        ("a.jsonl", [*GOOD[:3], b'["x", "y"]'], rf"line 4 of .*a\.jsonl is a list where an object .*{MEND}"),
        (
            "a.jsonl",
            [line(rejected=None)],
            rf"line 1 of .*a\.jsonl has no field 'rejected' .*'chosen'.*{MEND}",
        ),
        ("a.jsonl", [GOOD[0], line(chosen=" ")], rf"line 2 of .*a\.jsonl has an empty 'chosen'{MEND}"),
        (
            "a.jsonl",
            [line(rejected=ROWS[1]["chosen"])],
            rf"line 1 of .*a\.jsonl has 'chosen' equal to .*{MEND}",
        ),
        (
            "a.jsonl",
            [GOOD[0], b'{"prompt": "caf\xe9"}'],
            rf"line 2 of .*is not UTF-8 \(byte 16 is 0xe9\){MEND}",
        ),
        (
            "a.jsonl",
            [GOOD[0], line(prompt=7)],
            rf"line 2 of .*has a number in 'prompt' where a string .*{MEND}",
        ),
        ("a.jsonl", [], r"a\.jsonl has no rows: give a file with at least one"),
        ("a.jsonl", [b"", b"  "], r"a\.jsonl has no rows: give a file with at least one"),
        ("a.jsonl", [GOOD[0]], "the 1 rows form 1 group.*a held-out fraction of 0"),
        ("a.csv", GOOD, r"a\.csv is not of a kind that is read here: give a file ending in \.jsonl"),
        ("a.jsonl.gz", GOOD, r"a\.jsonl\.gz is not a whole gzip file .*: fetch or compress it again"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("a.") else "",
)
def test_a_file_that_cannot_be_used(name, lines, message, pristine, tmp_path):
    (tmp_path / name).write_bytes(b"\n".join(lines))
    refused(lambda: start_sft(pristine, tmp_path / "run", tmp_path / name), tmp_path / "run", message)


def test_a_file_that_is_none_or_torn_or_too_long(pristine, tmp_path):
    def refuse(path, message, **changes):
        refused(lambda: start_sft(pristine, tmp_path / "run", path, **changes), tmp_path / "run", message)

    (tmp_path / "folder.jsonl").mkdir()
    refuse(tmp_path / "folder.jsonl", r"folder\.jsonl is a directory: give the path of a file in it")
    refuse(tmp_path / "absent.jsonl", r"absent\.jsonl does not exist: check the path")
    packed = gzip.compress(b"\n".join(GOOD))
    (tmp_path / "torn.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    refuse(tmp_path / "torn.jsonl.gz", r"torn\.jsonl\.gz is not a whole gzip file")
    (tmp_path / "long.jsonl").write_bytes(b"\n".join([*GOOD[:4], json.dumps(LONG).encode()]))
    long = r"long\.jsonl:5 has a prompt of 22 tokens where prompt_length is 16: raise --config\.data\.prompt_length"
    refuse(tmp_path / "long.jsonl", long)
    context = r"prompt_length \+ response_length is 71, beyond the context of .*tiny \(64 tokens\); lower one of them"
    refuse(tmp_path / "long.jsonl", context, prompt_length=23)
    nothing = "the data gives 5 rows to train on and 0 held out for evaluation: raise --config.data.held_out_fraction"
    refuse(tmp_path / "long.jsonl", nothing, held_out_fraction=0.0)


def spoil_weights(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def spoil_vocabulary(model):
    another_tokenizer().save_pretrained(model)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda model: (model / "model.safetensors").unlink(),
            r"tiny has no weights: add model\.safetensors",
        ),
        (spoil_weights, r"model\.safetensors is not a whole safetensors file"),
        (lambda model: (model / "config.json").write_text("{"), r"tiny/config\.json is not JSON"),
        (lambda model: (model / "tokenizer.json").unlink(), "tiny holds no tokenizer that can be loaded"),
        (
            spoil_vocabulary,
            r"ids up to 136 and .*tiny has a vocabulary of 135: give the tokenizer that the model",
        ),
        (
            shutil.rmtree,
            r"there is no directory .*tiny; give the --workdir of a finished run, or a Hugging Face",
        ),
    ],
    ids=["no_weights", "half_weights", "config", "no_tokenizer", "vocabulary", "absent"],
)
def test_a_model_directory_that_cannot_be_used(spoil, message, model, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(GOOD))
    spoil(model)
    refused(lambda: start_sft(model, tmp_path / "run", tmp_path / "a.jsonl"), tmp_path / "run", message)


def test_runs_that_do_not_belong_together(params, tmp_path):
    policy = leave_run(tmp_path / "sft", params)
    stranger = leave_run(tmp_path / "stranger", params, tokenizer=another_tokenizer(), head=True)

    def judge(reward, message):
        for workdir, run in {
            "ppo": lambda at: ppo.run(ppo.Config(), at, init_from=policy, reward_from=reward, stop=STOP),
            "evaluate": lambda at: evaluate.run(
                evaluate.Config(), at, reference_from=policy, reward_from=reward, policies_from={}, stop=STOP
            ),
        }.items():
            refused(lambda run=run, at=tmp_path / workdir: run(at), tmp_path / workdir, message)

    judge(stranger, r"the tokenizers of .*sft and .*stranger differ .*; start both from the same SFT run")
    judge(policy, r"--reward_from=.*sft has no reward head; give a run of experiments\.reward_model")


def test_a_run_that_is_not_one_to_start_from(params, tmp_path):
    def refuse(path, message):
        at = tmp_path / "reward_model"
        refused(
            lambda: reward_model.run(reward_model.Config(), at, init_from=str(path), stop=STOP), at, message
        )

    half = tmp_path / "half"
    half.mkdir()  # killed before its first checkpoint
    (half / "config.json").write_text(json.dumps({"stage": "sft", "config": {}, "inputs": {}}))
    refuse(half, r"the run at .*half has left no hand-off yet; run its stage to the end first")
    edited = pathlib.Path(leave_run(tmp_path / "edited", params)) / "handoff"
    another_tokenizer().save_pretrained(edited / "tokenizer")
    refuse(
        tmp_path / "edited",
        r"the hand-off .*edited/handoff is damaged \(tokenizer/.* does not match its SHA-256\)",
    )
    (edited / "digests.json").unlink()
    refuse(
        tmp_path / "edited", r"handoff/tokenizer is not the tokenizer that .*handoff\.json names; restore it"
    )


def test_a_workdir_that_cannot_be_used_is_left_as_it_is(model, params, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(GOOD))
    (tmp_path / "file").write_text("mine")
    leave_run(tmp_path / "reward_model", params, head=True)
    described = {"stage": "reward_model", "config": {}, "inputs": {}}
    (tmp_path / "reward_model" / "config.json").write_text(json.dumps(described))
    before = contents(tmp_path)
    for workdir, message in (
        ("tiny", r"tiny/config\.json is not of a run of this project; give a new or an empty --workdir"),
        ("file/run", r"cannot write to workdir .*file/run: Not a directory; give a writable one"),
        ("file", r"cannot write to workdir .*file: File exists; give a writable one"),
        (
            "reward_model",
            r"belongs to a run with another config \(.*stage: 'reward_model' -> 'sft'\); give another",
        ),
    ):
        with pytest.raises(InputError, match=message):
            start_sft(model, tmp_path / workdir, tmp_path / "a.jsonl")
        assert contents(tmp_path) == before


def test_a_run_that_was_refused_may_be_mended_in_place(pristine, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*GOOD, json.dumps(LONG).encode()]))
    with pytest.raises(InputError, match="prompt of 22 tokens"):
        start_sft(pristine, tmp_path / "run", tmp_path / "a.jsonl")
    start_sft(pristine, tmp_path / "run", tmp_path / "a.jsonl", truncation="keep_end")
    assert checkpoints.is_finished(tmp_path / "run")
    truncated = json.loads((tmp_path / "run" / "data.json").read_text())["train"]["truncated"]
    assert truncated == [["a.jsonl:41", "has a prompt of 22 tokens where prompt_length is 16"]]
    with pytest.raises(InputError, match="truncation: 'keep_end' -> 'drop'"):
        start_sft(pristine, tmp_path / "run", tmp_path / "a.jsonl", truncation="drop")


SPOILT = [*GOOD[:9], b"{oops", line(chosen=""), *GOOD[9:], json.dumps(LONG).encode()]
LEFT_OUT = [
    ["a.jsonl:10", "is not JSON (Expecting property name enclosed in double quotes at column 2)"],
    ["a.jsonl:11", "has an empty 'chosen'"],
]
ON_REQUEST = {"on_bad_row": "skip", "truncation": "drop", "held_out_fraction": 0.4}


def check_counts(workdir: pathlib.Path, parts: set[str]) -> dict:
    """data.json names the two bad rows and the long one; every other row is kept somewhere."""
    found = json.loads((workdir / "data.json").read_text())
    assert found.pop("unreadable") == LEFT_OUT
    assert set(found) == parts
    dropped = [row for part in found.values() for row in part["dropped"]]
    assert dropped == [["a.jsonl:43", "has a prompt of 22 tokens where prompt_length is 16"]]
    return found


def test_rows_left_out_on_request_are_counted_and_named(pristine, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(SPOILT))
    workdir = tmp_path / "run"
    config = reward_model.Config(
        data=data(tmp_path / "a.jsonl", **ON_REQUEST), schedule=Schedule(num_steps=1), batch_size=8
    )
    reward_model.run(config, workdir, init_from=str(pristine), stop=STOP)
    found = check_counts(workdir, {"train", "held_out"})
    assert found["train"]["kept"] + found["held_out"]["kept"] == len(ROWS)
    page = report.write_report(workdir).read_text()
    for source, reason in [*LEFT_OUT, ["a.jsonl:43", "has a prompt of 22 tokens"]]:
        assert source in page and reason.replace("'", "&#x27;") in page


def test_prompts_left_out_on_request_are_counted_and_named(params, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(SPOILT))
    policy, reward = leave_run(tmp_path / "sft", params), leave_run(tmp_path / "reward", params, head=True)

    class Reached(Exception):
        pass

    def reach(**_):
        raise Reached

    monkeypatch.setattr(online, "fit", reach)
    prompts = len({row["prompt"] for row in ROWS})
    places = set()
    for seed in range(3):  # the long prompt is trained on under one split and held out under another
        rows = data(tmp_path / "a.jsonl", split_seed=seed, **ON_REQUEST)
        with pytest.raises(Reached):
            ppo.run(
                ppo.Config(data=rows), tmp_path / f"{seed}", init_from=policy, reward_from=reward, stop=STOP
            )
        found = check_counts(tmp_path / f"{seed}", {"train", "held_out"})
        assert found["train"]["kept"] + found["held_out"]["kept"] == prompts
        places |= {name for name, part in found.items() if part["dropped"]}
    assert places == {"train", "held_out"}
    stopped = StopRequest()
    stopped.requested = "SIGTERM"
    where = {"reference_from": policy, "reward_from": reward, "policies_from": {}}
    with pytest.raises(Interrupted):
        evaluate.run(evaluate.Config(data=rows), tmp_path / "evaluate", stop=stopped, **where)
    assert json.loads((tmp_path / "evaluate" / "data.json").read_text())["unreadable"] == LEFT_OUT


def test_a_field_that_has_no_value_yet_can_be_set_from_the_command_line(monkeypatch):
    def parse(value):
        values, arguments = flags.FlagValues(), ["main", f"--config.missing_eos_score={value}"]
        monkeypatch.setattr(sys, "argv", arguments)  # where ml_collections looks for the fields to define
        config_flags.DEFINE_config_dict("config", to_config_dict(ppo.Config()), flag_values=values)
        values(arguments)
        return configs.from_dict(ppo.Config, values["config"].value.to_dict())

    assert parse("-1.5") == ppo.Config(missing_eos_score=-1.5)
    assert configs.from_dict(ppo.Config, to_config_dict(ppo.Config()).to_dict()) == ppo.Config()
    with pytest.raises(InputError, match="config.missing_eos_score is nan; it must be a finite number"):
        parse("nan")
    with pytest.raises(flags.IllegalFlagValueError, match="could not convert string to float: 'high'"):
        parse("high")


def test_at_the_command_line(pristine, tmp_path):
    """Exit status 2, one line on standard error; what a run has saved stays as it is."""
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*GOOD, b"{oops"]))
    values = sft_config.get_config()
    values.model.path, values.data.path, values.data.on_bad_row = (
        str(pristine),
        str(tmp_path / "a.jsonl"),
        "skip",
    )
    values.batch_size, values.schedule.num_steps = 8, 3
    config = configs.from_dict(sft.Config, values.to_dict())
    with pytest.raises(Interrupted):
        sft.run(config, tmp_path / "begun", stop=StopAfter(2))
    shutil.copytree(tmp_path / "begun", tmp_path / "cut")
    largest = max(
        (tmp_path / "cut" / "checkpoints").rglob("*"), key=lambda path: path.stat().st_size * path.is_file()
    )
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    given = [
        f"--config.model.path={pristine}",
        f"--config.data.path={tmp_path / 'a.jsonl'}",
        "--config.batch_size=8",
    ]
    given += ["--config.schedule.num_steps=3"]
    skip = [*given, "--config.data.on_bad_row=skip"]
    cases = {
        ("sft", "new", *given): [
            f"line 41 of {tmp_path / 'a.jsonl'} is not JSON",
            "--config.data.on_bad_row=skip",
        ],
        ("sft", "begun", *skip, "--config.seed=1"): [
            "another config (config.seed: 0 -> 1); give another --workdir"
        ],
        ("sft", "cut", *skip): [
            "no checkpoint in",
            "is whole",
            "does not match its SHA-256",
            "another --workdir",
        ],
        ("sft", "new", "--config=absent.py", "--config.seed=1"): ["--config cannot be loaded", "'absent.py'"],
    }
    before = contents(tmp_path)
    running = {
        (main, at, *rest): start(main, f"--workdir={tmp_path / at}", *rest) for main, at, *rest in cases
    }
    for case, process in running.items():
        out, err = process.communicate(timeout=300)
        assert process.returncode == 2, (case, err)
        (said,) = [text for text in err.splitlines() if text.startswith("error: ")]
        assert all(part in said for part in cases[case]), (case, said)
        assert "Traceback" not in err and not out
    left = contents(tmp_path)
    new = {path for path in set(left) - set(before) if not path.startswith(f"{tmp_path / 'new'}/")}
    assert {path: text for path, text in left.items() if path in before} == before
    assert not new
    assert not (tmp_path / "new" / "metrics.jsonl").exists()
