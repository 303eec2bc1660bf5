"""experiments.prepare_data as a process: what it prints, what it refuses, and what a signal leaves behind."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from rlhf_jax.data import batches, prepared, scans, world
from rlhf_jax.data import tokenizer as tokenizers

ROOT = pathlib.Path(__file__).parents[2]
GOOD = {"prompt": "Say hi.", "chosen": "Hi!", "rejected": "No."}


def start(source: pathlib.Path, output: pathlib.Path, *rest: str) -> subprocess.Popen:
    given = [f"--source={source}", "--kind=preferences", f"--output={output}", *rest]
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.prepare_data", *given],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_says_what_it_kept_and_what_not_and_why(tmp_path):
    lines = [json.dumps({**GOOD, "prompt": str(i)}) for i in range(5)]
    lines += ["{oops", json.dumps({**GOOD, "chosen": ""}), json.dumps({**GOOD, "chosen": " "})]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    refused = start(tmp_path / "in.jsonl", tmp_path / "out")
    kept = start(tmp_path / "in.jsonl", tmp_path / "kept", "--on_bad_row=skip")
    out, err = refused.communicate(timeout=120)
    assert (refused.returncode, out) == (2, "")
    assert err.startswith(f"error: line 6 of {tmp_path / 'in.jsonl'} is not JSON")
    assert err.endswith(": mend it or pass --on_bad_row=skip.\n")
    out, err = kept.communicate(timeout=120)
    assert kept.returncode == 0, err
    assert out.splitlines() == [
        "kept 5 rows (preferences) of 5 records; left out 3 of 8 records",
        "       2  has an empty 'chosen'",
        "       1  is not JSON (Expecting property name enclosed in double quotes at column 2)",
        "          in.jsonl:6 is not JSON (Expecting property name enclosed in double quotes at column 2)",
        "          in.jsonl:7 has an empty 'chosen'",
        "          in.jsonl:8 has an empty 'chosen'",
        str(tmp_path / "kept"),
    ]
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "kept"]
    assert len(prepared.open_prepared(tmp_path / "kept").rows) == 5


def test_what_fits_is_known_before_a_stage_starts(tmp_path, monkeypatch):
    tokenizer = world.world_tokenizer()
    tokenizers.save_tokenizer(tokenizer, tmp_path / "tokenizer")
    rows = [{"prompt": "bold", "chosen": "warm " * n, "rejected": "dull"} for n in (1, 2, 9)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = [
        f"--tokenizer={tmp_path / 'tokenizer'}",
        "--prompt_length=4",
        "--response_length=4",
        "--truncation=drop",
    ]
    out, err = start(tmp_path / "in.jsonl", tmp_path / "out", *given).communicate(timeout=120)
    assert out.splitlines()[-2:] == [
        "2 rows fit or were cut to fit (0 were cut); 1 do not",
        str(tmp_path / "out"),
    ], err
    monkeypatch.setattr(scans, "_scan", None)  # a second scan would fail
    encoded, report = batches.encode_preferences(
        prepared.open_prepared(tmp_path / "out").rows,
        tokenizers.load_tokenizer(tmp_path / "tokenizer"),
        prompt_length=4,
        response_length=4,
        truncation="drop",
    )
    assert len(encoded) == 2
    assert report.dropped[0][0] == "in.jsonl:3"


def test_a_signal_leaves_nothing_half_written(tmp_path):
    line = json.dumps({**GOOD, "padding": "x" * 500}) + "\n"
    (tmp_path / "in.jsonl").write_text(line * 300_000)
    process = start(tmp_path / "in.jsonl", tmp_path / "out")
    deadline = time.monotonic() + 100
    while not (tmp_path / "out.partial").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0
    assert "stopped by SIGTERM: nothing was kept; run the same command again" in err
    assert os.listdir(tmp_path) == ["in.jsonl"]
