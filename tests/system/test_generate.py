"""`experiments.generate` as a person runs it, on a small random model."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from rlhf_jax.data import tokenizer as tk
from rlhf_jax.data.world import world_tokenizer
from rlhf_jax.models import decoder, huggingface
from rlhf_jax.models.config import ModelConfig

ROOT = pathlib.Path(__file__).parents[2]
PROMPTS = ["praise the cast .", "the songs", "bold cast and"]
# Many command lines in one process, as starting one takes seconds; prints [standard output, error] of each.
MANY = """
import contextlib, io, json, sys
from absl import flags
from experiments import generate
from rlhf_jax.errors import InputError
from rlhf_jax.training.interrupt import StopRequest

found = []
for arguments, text in json.load(sys.stdin):
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["generate", *arguments])
    sys.stdin, shown, error = io.StringIO(text), io.StringIO(), None
    with contextlib.redirect_stdout(shown):
        try:
            generate.main(StopRequest())
        except InputError as refused:
            error = str(refused)
    found.append((shown.getvalue(), error))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face directory of a model of the embedded world's words."""
    path, tokenizer = tmp_path_factory.mktemp("policy"), world_tokenizer()
    config = ModelConfig(
        vocab_size=len(tokenizer),
        width=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        mlp_width=32,
        max_length=64,
    )
    params = decoder.init_params(config, jax.random.key(0))
    huggingface.save_pretrained(path, config, params, bos_id=1, eos_id=2, pad_id=0)
    tk.save_tokenizer(tokenizer, path)
    return path


def start(*command, stdin="", devices=1):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    }
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_many(*runs):
    """(standard output, error) of each (arguments, standard input)."""
    finished = start("-c", MANY, stdin=json.dumps(runs))
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def objects(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_samples_are_the_same_however_they_are_batched(folder, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS[1:]))
    options = [f"--model={folder}", "--max_new_tokens=24", "--num_samples=3", "--jsonl", "--top_p=0.95"]
    options.append("--seed=4")
    first, refilled = run_many(
        ([*options, f"--prompt={PROMPTS[0]}", f"--prompts_file={file}"], ""),
        ([*options, "--batch_size=2", "--refill"], "\n\n".join(PROMPTS)),
    )
    found = objects(first[0])
    assert [(row["prompt"], row["sample"]) for row in found] == [(p, i) for p in PROMPTS for i in range(3)]
    assert [row["source"] for row in found[::3]] == ["--prompt 1", "prompts.jsonl:1", "prompts.jsonl:2"]
    assert len({row["response"] for row in found}) == 9
    for row in found:
        assert len(row["response"].split()) == row["tokens"] - (row["ended_by"] == "eos")
        assert row["ended_by"] == "eos" or row["tokens"] == 24
        assert row["policy_log_prob"] < row["log_prob"] < 0
    # In batches of four over two devices, as a process of its own; and through a cache of two rows.
    process = start(
        "-m", "experiments.generate", *options, "--batch_size=4", stdin="\n".join(PROMPTS), devices=2
    )
    assert process.returncode == 0, process.stderr
    for other in (objects(process.stdout), objects(refilled[0])):
        for name in ("prompt", "sample", "response", "ended_by", "tokens"):
            assert [row[name] for row in other] == [row[name] for row in found], name
    assert objects(refilled[0])[3]["source"] == "line 3 of standard input"


@pytest.mark.slow
def test_text_stops_before_a_stop_string(folder):
    options = [f"--model={folder}", f"--prompt={PROMPTS[0]}", "--seed=1", "--max_new_tokens=12"]
    ((whole, _),) = run_many(([*options, "--jsonl"], ""))
    text = objects(whole)[0]["response"]
    said = text.split()
    # From inside one word into the next, for the first time there.
    place, stop = next(
        (i, both)
        for i in range(3, len(said))
        if (both := f"{said[i - 1][-2:]} {said[i][:1]}") not in " ".join(said[:i])
    )
    options.append(f"--stop={stop}")
    (cut, _), (shown, _) = run_many(([*options, "--jsonl"], ""), (options, ""))
    (cut,) = objects(cut)
    assert (cut["ended_by"], cut["tokens"]) == ("stop", place + 1)
    assert cut["response"] == text[: text.index(stop)]
    assert shown == (
        f"=== --prompt 1, sample 0: {place + 1} tokens, ended by a stop string\n"
        f"{PROMPTS[0]}\n--- {cut['response']}\n"
    )


@pytest.mark.slow
def test_greedy_takes_no_notice_of_the_seed_and_chat_of_the_template(folder, tmp_path):
    chatty = tmp_path / "chatty"
    tokenizer = tk.load_tokenizer(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %} the"
    tk.save_tokenizer(tokenizer, chatty)
    for file in ("config.json", "model.safetensors"):
        (chatty / file).write_bytes((folder / file).read_bytes())
    options = ["--greedy", "--max_new_tokens=12", "--jsonl"]
    found = run_many(
        ([f"--model={folder}", "--prompt=bold cast and", "--seed=1", *options], ""),
        ([f"--model={folder}", "--prompt=bold cast and", "--seed=2", *options], ""),
        ([f"--model={folder}", "--prompt=bold cast the", *options], ""),
        ([f"--model={chatty}", "--prompt=bold cast", "--chat", *options], ""),
    )
    first, again, the, chat = (objects(shown)[0]["response"] for shown, _ in found)
    assert first == again
    assert len(first.split()) > 3
    # A template writes its own BOS, and this one writes none.
    assert the != chat
    ((shown, _),) = run_many(([f"--model={chatty}", "--prompt=<s> bold cast", "--chat", *options], ""))
    assert objects(shown)[0]["response"] == the


def test_what_cannot_be_done_is_said_in_a_sentence(folder):
    cases = {
        ("--max_new_tokens=64",): "leaves no room for a prompt in the context of 64 tokens",
        ("--max_new_tokens=62",): "--prompt 1 has 3 tokens, and with --max_new_tokens=62",
        ("--max_new_tokens=5", "--stop=Ω"): "stop string 'Ω' can never match",
        ("--max_new_tokens=5", "--top_p=0"): "top_p is 0.0",
        ("--max_new_tokens=5", "--chat"): "--prompt 1 is a conversation and the tokenizer has no chat",
    }
    model = f"--model={folder}"
    for (said, error), expected in zip(
        run_many(*(([model, "--prompt=the cast", *arguments], "") for arguments in cases)),
        cases.values(),
        strict=True,
    ):
        assert said == ""
        assert expected in error
        assert "\n" not in error
    nothing = start("-m", "experiments.generate", model)
    assert nothing.returncode == 2
    assert nothing.stderr == (
        "error: there is no prompt: give --prompt=..., --prompts_file=..., or lines on standard input\n"
    )
