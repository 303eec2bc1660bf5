"""A judge behind a pipe: what it says, and every way in which a real process fails to say it."""

import json
import pathlib
import shlex
import sys
import textwrap
import time

import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.rewards import judges

ANSWER = """
import json, os, sys, time
for line in sys.stdin:
    asked = json.loads(line)
    kind = asked["prompt"]
    scores = [float(len(text)) for text in asked["responses"]]
    if kind == "sleep":
        time.sleep(30)
    if kind == "die":
        os._exit(3)
    if kind == "abort":
        os.abort()
    if kind == "short":
        scores = scores[1:]
    answer = json.dumps({"scores": scores})
    if kind == "nan":
        answer = '{"scores": [NaN, 1.0]}'
    if kind == "huge":
        answer = '{"scores": [1e39, 1.0]}'
    if kind == "digits":
        answer = '{"scores": [1' + "0" * 400 + ", 1.0]}"
    if kind == "words":
        answer = '{"scores": ["good", 1.0]}'
    if kind == "true":
        answer = '{"scores": [true, 1.0]}'
    if kind == "list":
        answer = "[1.0, 2.0]"
    if kind == "prose":
        answer = "The first one is better."
    if kind == "deep":
        answer = "[" * 100000
    if kind == "endless":
        answer = "x" * (3 << 20)
    if kind == "twice":
        answer += "\\n" + answer
    print(answer, flush=True)
"""


def command_of(tmp_path: pathlib.Path, source: str = ANSWER) -> str:
    """A judge of this source; ``-I -S`` starts it in a fiftieth of a second."""
    path = tmp_path / "judge.py"
    path.write_text(textwrap.dedent(source))
    return shlex.join([sys.executable, "-I", "-S", str(path)])


@pytest.fixture
def judge(tmp_path):
    asked = judges.CommandJudge(command_of(tmp_path), seconds=10.0, failures=100)
    yield asked
    asked.close()


def test_a_judge_is_started_once_and_scores_groups(tmp_path):
    log = tmp_path / "started"
    started = f"open({str(log)!r}, 'a').write('x')\n"
    judge = judges.CommandJudge(command_of(tmp_path, started + ANSWER), seconds=10.0, failures=1)
    prompts = ["p", "p", "q", "q", "p", "p"]
    found = judges.judge_groups(judge, prompts, ["a", "bbb", "", "cc", "\ud800\n{}", "d"], 2)
    judge.close()
    assert found.scores.dtype == np.float32 and found.scores.tolist() == [1, 3, 0, 2, 4, 1]
    assert found.has_verdict.all() and set(found.reasons.values()) == {0}
    assert log.read_text() == "x"


@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_groups_are_counted_and_neighbours_with_one_prompt_may_be_two(tmp_path, group_size):
    """The judge says how many responses each of its questions had."""
    source = """
    import json, sys
    for line in sys.stdin:
        count = len(json.loads(line)["responses"])
        print(json.dumps({"scores": [count] * count}), flush=True)
    """
    judge = judges.CommandJudge(command_of(tmp_path, source), seconds=10.0, failures=1)
    found = judges.judge_groups(judge, ["p"] * 4, ["a"] * 4, group_size)
    judge.close()
    assert found.scores.tolist() == [group_size] * 4


FAILURES = {
    "die": ("died", "exited with status 3"),
    "abort": ("died", "was ended by SIGABRT"),
    "nan": ("not_finite", "gave the score 'nan', which is not finite"),
    "huge": ("not_finite", r"gave the score '1e\+39', which is not finite"),
    "digits": ("not_finite", r"gave the score '10+\.\.\.', which is not finite"),
    "short": ("wrong_count", "gave 1 scores for 2 responses"),
    "words": ("malformed", "gave the score '\"good\"', which is no number"),
    "true": ("malformed", "gave the score 'true', which is no number"),
    "list": ("malformed", 'which has no list of "scores"'),
    "prose": ("malformed", "answered 'The first one is better.', which is not JSON"),
    "deep": ("malformed", r"answered '\[+\.\.\.', which is not JSON"),
    "endless": ("malformed", "answered more than 1048576 bytes"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_what_is_no_verdict_is_counted_and_the_next_group_is_judged(kind, judge):
    reason, message = FAILURES[kind]
    with pytest.raises(judges.NoVerdict, match=message):
        judge.scores(kind, ["a", "bb"])
    found = judges.judge_groups(judge, [kind, kind, "fine", "fine"], ["a", "bb", "a", "bb"], 2)
    assert found.scores.tolist() == [0, 0, 1, 2]
    assert found.has_verdict.tolist() == [False, False, True, True]
    assert found.reasons == {name: int(name == reason) for name in judges.REASONS}


def test_a_judge_that_sleeps_is_late_and_its_answer_is_not_taken_for_the_next(tmp_path):
    judge = judges.CommandJudge(command_of(tmp_path), seconds=0.5, failures=100)
    started = time.monotonic()
    with pytest.raises(judges.NoVerdict, match="did not answer within 0.5 s"):
        judge.scores("sleep", ["a", "bb"])
    assert time.monotonic() - started < 5
    assert judge.scores("fine", ["ccc", ""]) == [3.0, 0.0]
    judge.close()


def test_a_judge_that_never_reads_is_late_and_not_waited_for(tmp_path):
    """A question larger than a pipe holds."""
    judge = judges.CommandJudge(
        command_of(tmp_path, "import time\ntime.sleep(60)\n"), seconds=0.5, failures=100
    )
    with pytest.raises(judges.NoVerdict, match="did not answer within"):
        judge.scores("p", ["x" * (4 << 20)])
    judge.close()


def test_an_answer_too_many_is_no_answer_to_the_next_question(tmp_path):
    judge = judges.CommandJudge(command_of(tmp_path), seconds=10.0, failures=100)
    with pytest.raises(judges.NoVerdict, match="answered more than one line"):
        judge.scores("twice", ["a", "bb"])
        judge.scores("fine", ["a", "bb"])
    assert judge.scores("fine", ["ccc", ""]) == [3.0, 0.0]
    judge.close()


def test_so_many_failures_in_a_row_end_the_run_in_a_sentence(tmp_path):
    command = command_of(tmp_path)
    judge = judges.CommandJudge(command, seconds=10.0, failures=3)
    kinds = ["die", "short", "fine", "short", "nan"]
    judges.judge_groups(judge, kinds, ["x"] * 5, 1)  # never three in a row
    message = (
        r"the judge '.*judge.py' gave no verdict 3 times in a row; the last time, on the prompt 'die', it exited with "
        "status 3; mend it, or allow more with config.judge.failures"
    )
    with pytest.raises(InputError, match=message):
        judges.judge_groups(judge, ["die"], ["x"], 1)


def is_gone(child: int) -> bool:
    """Within two seconds."""
    status = pathlib.Path(f"/proc/{child}/status")
    for _ in range(100):
        if not status.exists() or "State:\tZ" in status.read_text():
            return True
        time.sleep(0.02)
    return False


def test_a_judge_that_died_leaves_no_children(tmp_path):
    note = tmp_path / "child"
    source = f"""
    import os, pathlib, subprocess, sys
    sleep = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]
    child = subprocess.Popen(sleep, stdout=subprocess.DEVNULL)
    pathlib.Path({str(note)!r}).write_text(str(child.pid))
    os._exit(3)
    """
    judge = judges.CommandJudge(command_of(tmp_path, source), seconds=10.0, failures=100)
    with pytest.raises(judges.NoVerdict, match="exited with status 3"):
        judge.scores("p", ["x"])
    assert is_gone(int(note.read_text()))


def test_closing_ends_the_process_and_its_children(tmp_path):
    source = """
    import json, subprocess, sys
    child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"])
    for line in sys.stdin:
        print(json.dumps({"scores": [child.pid]}), flush=True)
    """
    judge = judges.CommandJudge(command_of(tmp_path, source), seconds=10.0, failures=1)
    (child,) = judge.scores("p", ["x"])
    judge.close()
    assert is_gone(int(child))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "the judge's command is empty"),
        ("python 'judge.py", "cannot be read .*; mend its quotes"),
        ("/no/such/judge", "the judge '/no/such/judge' cannot be started: No such file"),
    ],
)
def test_a_command_that_cannot_be_started_is_named(command, message):
    with pytest.raises(InputError, match=message):
        judges.CommandJudge(command, seconds=1.0, failures=1).scores("p", ["x"])


def test_an_answer_is_parsed_by_hand():
    assert judges.parse_answer(json.dumps({"scores": [1, -2.5]}).encode(), 2) == [1.0, -2.5]
    with pytest.raises(judges.NoVerdict, match="gave 2 scores for 3 responses"):
        judges.parse_answer(b'{"scores": [1, 2]}', 3)
