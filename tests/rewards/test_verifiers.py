"""Verifiers on real rows and on hostile text: the right reward, a reason, never an exception."""

import gzip
import json

import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.rewards import verifiers

HOSTILE = [
    "", "\x00\x1b[31m\x07", "nan", "1e400", "inf", "\ud800", "9" * 1_000_000, "(" * 1_000_000, "a" * 1_000_000,
    "#### " + "\\frac{" * 100_000, "\\frac{\\frac{1}{2}}{\\frac{3}{4}}", "1/0", "#### " + "1/" * 400_000 + "1",
]  # fmt: skip


def rows(path):
    if not path.is_file():
        pytest.skip(f"real rows missing: {path}")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize(("name", "count"), [("gsm8k_train", 7473), ("gsm8k_test", 1319)])
def test_every_gold_solution_is_right_for_its_own_answer_and_wrong_for_another(shared_data, name, count):
    solutions = [row["answer"] for row in rows(shared_data / "math" / f"{name}.jsonl.gz")]
    answers = [solution.rpartition("####")[2].strip() for solution in solutions]
    assert len(solutions) == count
    assert verifiers.gsm8k_reward(solutions, answers).sum() == count
    assert verifiers.gsm8k_reward(answers, solutions).sum() == count
    others = [
        next(other for other in answers[i:] + answers[:i] if float(other.replace(",", "")) != number)
        for i, number in enumerate(float(answer.replace(",", "")) for answer in answers)
    ]
    assert verifiers.gsm8k_reward(solutions, others).sum() == 0


def test_without_its_marked_line_a_gold_solution_is_mostly_still_read(shared_data):
    solutions = [row["answer"] for row in rows(shared_data / "math" / "gsm8k_test.jsonl.gz")]
    prose = [solution.partition("####")[0] for solution in solutions]
    # The rest end on another number: "= 5 hours to read 120 pages".
    assert verifiers.gsm8k_reward(prose, solutions).sum() == 1280


def test_gsm8k_rewards_are_float32_and_say_why():
    completions = ["A: 3/6", "#### 2", "no idea", None, b"5"]
    reward = verifiers.gsm8k_reward(completions, ["0.5"] * 5)
    assert reward.dtype == np.float32 and reward.tolist() == [1, 0, 0, 0, 0]
    reasons = [verdict.reason for verdict in verifiers.gsm8k_verdicts(completions, ["0.5"] * 5)]
    assert reasons[1] == "2 was said, 1/2 is right"
    assert (
        "no number" in reasons[2] and "NoneType, not text" in reasons[3] and "bytes, not text" in reasons[4]
    )
    (verdict,) = verifiers.gsm8k_verdicts(["#### 5"], ["unknown"])
    assert verdict.reward == 0 and "reference answer" in verdict.reason


@pytest.mark.parametrize(
    "verify", [verifiers.gsm8k_verdicts, verifiers.game24_verdicts, verifiers.exact_match_verdicts]
)
def test_hostile_text_gets_nothing_and_a_reason(verify):
    verdicts = verify(HOSTILE, ["1 2 3 4"] * len(HOSTILE))
    assert [verdict.reward for verdict in verdicts] == [0.0] * len(HOSTILE)
    assert all(verdict.reason and len(verdict.reason) < 400 for verdict in verdicts)
    assert all(0.0 <= verdict.reward <= 1.0 for verdict in verify(["4"] * len(HOSTILE), HOSTILE))


def test_a_completion_beyond_the_limit_is_not_read():
    (verdict,) = verifiers.gsm8k_verdicts(["x" * (verifiers.MAX_COMPLETION_LENGTH + 1) + "#### 5"], ["5"])
    assert verdict.reward == 0 and "more than" in verdict.reason


def test_lists_that_do_not_pair_are_the_callers_mistake():
    with pytest.raises(ValueError, match="2 completions and 1 answers"):
        verifiers.gsm8k_reward(["1", "2"], ["1"])
    with pytest.raises(ValueError, match="answers is one text"):
        verifiers.exact_match_reward(["1", "2"], "12")
    assert verifiers.gsm8k_reward([], []).shape == (0,)


def test_exact_match_leaves_white_space_free_and_nothing_else():
    said = ["the  cat\n", "The cat", "the cat.", "thecat", "the cat"]
    assert verifiers.exact_match_reward(said, ["the cat"] * 5).tolist() == [1, 0, 0, 0, 1]


def test_a_format_must_match_from_end_to_end():
    pattern = r"(?s)<think>.*</think>\s*<answer>[^<]*</answer>"
    good = "<think>a\nb</think>\n<answer>5</answer>"
    texts = [good, good + "!", "x" + good, "", None, "\ud800", good.replace("5", "\x00")]
    assert verifiers.format_reward(texts, pattern).tolist() == [1, 0, 0, 0, 0, 0, 1]


def test_a_catastrophic_pattern_costs_its_row_alone():
    texts = ["a" * 40, "aab", "b" * 1_000_000, "a" * 200_000, "ab"]
    verdicts = verifiers.format_verdicts(texts, "(a+)+b")
    assert [verdict.reward for verdict in verdicts] == [0, 1, 0, 0, 1]
    assert "longer than" in verdicts[0].reason and "longer than" in verdicts[3].reason
    assert "does not match" in verdicts[2].reason


def test_rows_after_one_that_kills_the_matcher_are_still_judged(monkeypatch):
    dying = verifiers._MATCHER.replace("pattern.full", '(text == "die" and sys.exit(1)) or pattern.full')
    monkeypatch.setattr(verifiers, "_MATCHER", dying)
    verdicts = verifiers.format_verdicts(["a", "die", "a", "b"], "a")
    assert [verdict.reward for verdict in verdicts] == [1, 0, 1, 0] and "died" in verdicts[1].reason


def test_a_pattern_that_does_not_compile_is_the_callers_mistake():
    with pytest.raises(InputError, match=r"'\(' is no regular expression"):
        verifiers.format_reward(["x"], "(")


def test_every_solution_of_the_real_puzzles_makes_24(shared_data):
    puzzles = rows(shared_data / "math" / "openr_game24_train_dedup.jsonl.gz")
    pairs = [(answer["text"], row["question"]) for row in puzzles for answer in row["answer"]]
    solutions, questions = zip(*pairs, strict=True)
    assert len(puzzles) == 1000 and len(pairs) == 25917
    assert verifiers.game24_reward(solutions, questions).sum() == 25917
    # Puzzles are distinct, so that none is solved by the numbers of another.
    assert verifiers.game24_reward(solutions, questions[1000:] + questions[:1000]).sum() == sum(
        sorted(a.split()) == sorted(b.split())
        for a, b in zip(questions, questions[1000:] + questions[:1000], strict=True)
    )


@pytest.mark.parametrize(
    ("completion", "reward", "reason"),
    [
        ("8 / (3 - 8 / 3)", 1, "is 24"),
        ("I try.\nThe answer is 8/(3-8/3) = 24.", 1, "is 24"),
        ("#### **(8*3)*(8/8)**", 0, "were used"),
        ("A: 8*3", 0, "were used"),
        ("8*3*8/8 = 24", 0, "were used"),
        ("8+8+3+3 = 24", 0, "22, not 24"),
        ("83 - 8 - 3", 0, "were used"),
        ("24", 0, "were used"),
        ("8*3+8*0/3", 0, "were used"),
        ("__import__('os').system('true')", 0, "no part of a sum"),
        ("8/(3-8/3)\nnot sure", 0, "no part of a sum"),
    ],
)
def test_a_game_of_24_by_hand(completion, reward, reason):
    (verdict,) = verifiers.game24_verdicts([completion], ["3 3 8 8"])
    assert verdict.reward == reward and reason in verdict.reason, verdict


def test_a_puzzle_without_numbers_cannot_be_won():
    assert verifiers.game24_verdicts(["24"], ["none"])[0].reason == "the puzzle names no numbers"
