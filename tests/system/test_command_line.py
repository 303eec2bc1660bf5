"""Real processes: what a person at a shell sees when it works, when it is stopped, and when something is wrong."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from rlhf_jax import checkpoints

ROOT = pathlib.Path(__file__).parents[2]
TINY_MODEL = [
    "--config.model.width=16",
    "--config.model.num_layers=1",
    "--config.model.num_heads=2",
    "--config.model.num_kv_heads=1",
    "--config.model.mlp_width=32",
]
TINY_WORLD = [
    "--config.data.world.num_demonstrations=64",
    "--config.data.world.num_preferences=64",
    "--config.data.world.num_prompts=64",
    "--config.data.world.num_eval_prompts=16",
    "--config.data.world.num_eval_preferences=16",
]
SFT = ["sft", *TINY_MODEL, *TINY_WORLD, "--config.batch_size=8", "--config.schedule.num_steps=300"]
SFT += ["--config.schedule.save_every=7", "--config.schedule.log_every=1"]


def start(main: str, *arguments: str, cwd=ROOT) -> subprocess.Popen:
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax")}
    return subprocess.Popen(
        [sys.executable, "-m", f"experiments.{main}", *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(main: str, *arguments: str) -> subprocess.CompletedProcess:
    process = start(main, *arguments)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for_rows(workdir: pathlib.Path, rows: int) -> None:
    metrics = workdir / "metrics.jsonl"
    for _ in range(6000):
        if metrics.exists() and metrics.read_text().count("\n") > rows:
            return
        time.sleep(0.01)
    raise AssertionError(f"{metrics} never had {rows} rows")


def params_of(workdir: pathlib.Path):
    return jax.device_get(checkpoints.restore_params(checkpoints.handoff_path(workdir)))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("undisturbed") / "sft"
    finished = run(*SFT, f"--workdir={workdir}")
    assert finished.returncode == 0, finished.stderr
    assert "sft 300/300" in finished.stderr and "tokens/s" in finished.stderr
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_stopped_and_run_again_ends_in_the_same_bits(how, undisturbed, tmp_path):
    process = start(*SFT, f"--workdir={tmp_path}")
    wait_for_rows(tmp_path, 25)
    process.send_signal(how)
    _, err = process.communicate(timeout=120)
    if how == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 0, err
        assert f"{how.name}: saved step" in err and "run the same command again" in err
        assert "Traceback" not in err
    assert not checkpoints.is_finished(tmp_path)
    again = run(*SFT, f"--workdir={tmp_path}")
    assert again.returncode == 0, again.stderr
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path), params_of(undisturbed))
    assert (tmp_path / "metrics.jsonl").read_text() == (undisturbed / "metrics.jsonl").read_text()


def write_lines(path: pathlib.Path, *lines: bytes) -> str:
    path.write_bytes(b"\n".join(lines))
    return str(path)


GOOD = json.dumps({"prompt": "the plot", "chosen": "was great", "rejected": "was dull"}).encode()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            lambda d: ["--config.data.path=" + write_lines(d / "a.jsonl", GOOD, b"{oops")],
            ["line 2", "not JSON"],
        ),
        (lambda d: [f"--config.model.path={d / 'nowhere'}"], ["nowhere"]),
        (lambda d: ["--config.no_such_option=3"], ["no_such_option"]),
        (
            lambda d: ["--config.batch_size=6", "--config.num_microbatches=4"],
            ["batch_size is 6", "num_microbatches=4"],
        ),
        (lambda d: [f"--config={write_lines(d / 'broken.py', b'def get_config(:')}"], ["broken.py"]),
    ],
    ids=["not_json", "no_model", "no_option", "no_division", "broken_config"],
)
def test_what_is_wrong_is_said_in_a_sentence(arguments, expected, shared_model_arguments, tmp_path):
    given = arguments(tmp_path)
    if any("data.path" in argument for argument in given):
        given += shared_model_arguments
    finished = run("sft", f"--workdir={tmp_path / 'run'}", *given)
    assert finished.returncode != 0
    for part in expected:
        assert part in finished.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.fixture
def shared_model_arguments(shared_data):
    return [f"--config.model.path={shared_data / 'models' / 'stories260K'}"]


@pytest.mark.parametrize("main", ["sft", "reward_model", "ppo", "dpo", "evaluate", "quickstart"])
def test_help_reads_like_documentation(main):
    finished = run(main, "--help")
    assert "python -m experiments." in finished.stdout
    assert "--workdir" in finished.stdout and "--config" in finished.stdout
    assert "Traceback" not in finished.stderr


@pytest.mark.slow
def test_the_ladder_from_nothing_to_a_report(tmp_path):
    stages = ("sft", "reward_model", "ppo", "ppo_no_leash", "dpo")
    tiny = [f"--config.{stage}.schedule.num_steps=2" for stage in stages]
    tiny += [f"--config.{stage}.batch_size=16" for stage in (*stages, "evaluate")]
    tiny += ["--config.evaluate.num_prompts=16", "--config.evaluate.best_of=2", *TINY_MODEL, *TINY_WORLD]
    tiny += [f"--config.{stage}.num_eval_prompts=16" for stage in ("ppo", "ppo_no_leash")]
    finished = run("quickstart", f"--workdir={tmp_path}", *tiny)
    assert finished.returncode == 0, finished.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"accuracy", "bayes_accuracy"} <= set(summary["reward_model"])
    assert set(summary["policies"]) == {"sft", "ppo", "ppo_no_leash", "dpo", "best_of_n"}
    for values in summary["policies"].values():
        assert {"proxy", "gold", "kl", "length", "distinct_2"} <= set(values)
    rows = [
        json.loads(line) for line in (tmp_path / "ppo_no_leash" / "metrics.jsonl").read_text().splitlines()
    ]
    evaluated = [row["eval/gold"] for row in rows if "eval/gold" in row]
    assert summary["policies"]["ppo_no_leash"]["gold_curve"] == evaluated
    assert "best_of_n" in finished.stdout and "Bayes ceiling" in finished.stdout
    assert (tmp_path / "report.html").stat().st_size > 10_000

    before = (tmp_path / "sft" / "metrics.jsonl").stat().st_mtime_ns
    again = run("quickstart", f"--workdir={tmp_path}", "--stages=ppo", *tiny)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "ppo.1" / "handoff" / "handoff.json").exists()
    assert (tmp_path / "sft" / "metrics.jsonl").stat().st_mtime_ns == before
    first, second = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("ppo.1", "ppo"))
    assert first == second, "the same stage from the same files is the same run"
