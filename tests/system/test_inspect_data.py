"""`experiments.inspect_data` as a person runs it."""

import json
import os
import pathlib
import subprocess
import sys

from rlhf_jax.data import prepared

ROOT = pathlib.Path(__file__).parents[2]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.inspect_data", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_two_splits_with_a_bad_row(tmp_path):
    good = {"prompt": "p", "chosen": "c", "rejected": "r", "votes_chosen": 2, "votes_rejected": 1}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(good)}\n{{\n")
    (tmp_path / "b.jsonl").write_text(json.dumps(good))
    data = f"--data=train={tmp_path / 'a.jsonl'},test={tmp_path / 'b.jsonl'}"
    stopped = run(f"--workdir={tmp_path / 'out'}", data)
    assert stopped.returncode == 2
    assert stopped.stderr.startswith(f"error: line 2 of {tmp_path / 'a.jsonl'} is not JSON")
    assert stopped.stderr.endswith("mend it or pass --on_bad_row=skip.\n")
    finished = run(f"--workdir={tmp_path / 'out'}", data, "--on_bad_row=skip")
    assert finished.returncode == 0, finished.stderr
    assert "1 train, 1 test; 1 records left out" in finished.stdout
    assert "test with train: of 1 rows 1 share a prompt" in finished.stdout
    assert "a.jsonl, b.jsonl" in (tmp_path / "out" / "report.html").read_text()
    twice = run(f"--workdir={tmp_path}", f"--data={tmp_path / 'b.jsonl'},{tmp_path / 'b.jsonl'}")
    assert "names 'all' twice: write name=path" in twice.stderr


def test_prepared_sets_say_what_their_files_say(tmp_path):
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    ranking = {"prompt": "q", "responses": ["a", "bb", "c"], "ranks": [[1, 2, 2], [2, 1, 3]]}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n{{\n")
    (tmp_path / "ranks.jsonl").write_text(json.dumps(ranking))
    prepared.prepare(tmp_path / "pairs.jsonl", "preferences", tmp_path / "pairs", on_bad_row="skip")
    prepared.prepare(tmp_path / "ranks.jsonl", "rankings", tmp_path / "ranks")
    prepared.prepare(tmp_path / "ranks.jsonl", "prompts", tmp_path / "prompts")
    out = f"--workdir={tmp_path / 'out'}"
    finished = run(out, f"--data=pairs={tmp_path / 'pairs'},ranks={tmp_path / 'ranks'}")
    assert finished.returncode == 0, finished.stderr
    assert "1 pairs, 2 ranks; 1 records left out\n  pairs.jsonl:2 is not JSON" in finished.stdout
    read = run(
        out, f"--data=pairs={tmp_path / 'pairs.jsonl'},ranks={tmp_path / 'ranks.jsonl'}", "--on_bad_row=skip"
    )
    assert read.stdout == finished.stdout
    refused = run(out, f"--data={tmp_path / 'prompts'}")
    assert refused.returncode == 2
    assert "was prepared as prompts: give a set of preferences or of rankings" in refused.stderr
