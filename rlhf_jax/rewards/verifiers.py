"""Rewards that can be checked: final answers, formats, sums and programs; imports this room's host-side modules, numpy.

Each verifier comes twice: ``…_verdicts`` gives a `Verdict` (reward and reason) for every completion, ``…_reward`` the
rewards alone, [B] float32. Completions are whatever a policy said: no text raises, and none takes more than the time
stated. What raises is what the caller got wrong: two lists of different lengths, a pattern that does not compile.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.rewards import expressions, sandbox
from rlhf_jax.rewards.answers import NoAnswer, final_number
from rlhf_jax.rewards.verdicts import Verdict, check_pairing, rewards_of

MAX_COMPLETION_LENGTH = 2_000_000
# How long one text may keep the regular expression busy.
FORMAT_SECONDS = 0.25
_TARGET = 24


def _right(reason: str) -> Verdict:
    return Verdict(reward=1.0, reason=reason)


def _wrong(reason: str) -> Verdict:
    return Verdict(reward=0.0, reason=reason)


def _judge(completion: object, judge: Callable[[str], Verdict]) -> Verdict:
    """``judge`` of a text; what is no text, or too long, is wrong."""
    if not isinstance(completion, str):
        return _wrong(f"the completion is {type(completion).__name__}, not text")
    if len(completion) > MAX_COMPLETION_LENGTH:
        return _wrong(f"the completion has more than {MAX_COMPLETION_LENGTH} characters")
    return judge(completion)


def gsm8k_verdicts(completions: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
    """Whether the final number of each completion equals that of the answer, exactly; see `answers.final_number`.

    An answer is a bare number ("1,450", "3/4") or a whole worked solution that ends in "#### 1450" (Cobbe et al. 2021).

    Raises:
      ValueError: not one answer for each completion.
    """
    check_pairing("answers", completions, answers)
    return [
        _judge(completion, lambda text, answer=answer: _number_verdict(text, str(answer)))
        for completion, answer in zip(completions, answers, strict=True)
    ]


def gsm8k_reward(completions: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """[B] float32, 1 where the final number is the answer's and 0 elsewhere; see `gsm8k_verdicts`."""
    return rewards_of(gsm8k_verdicts(completions, answers))


def _number_verdict(completion: str, answer: str) -> Verdict:
    try:
        wanted = final_number(answer[-MAX_COMPLETION_LENGTH:])
    except NoAnswer as error:
        return _wrong(f"the reference answer cannot be read: {error}")
    try:
        said = final_number(completion)
    except NoAnswer as error:
        return _wrong(str(error))
    if said == wanted:
        return _right(f"{_show(said)} is right")
    return _wrong(f"{_show(said)} was said, {_show(wanted)} is right")


def _show(number: Fraction) -> str:
    text = str(number)
    return text if len(text) <= 60 else f"{text[:57]}..."


def exact_match_verdicts(completions: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
    """Whether each completion is the answer, letter by letter; white space at the ends, and how much inside, is free.

    Raises:
      ValueError: not one answer for each completion.
    """
    check_pairing("answers", completions, answers)

    def compare(text: str, answer: str) -> Verdict:
        same = text.split() == answer.split()
        return _right("the same text") if same else _wrong("another text")

    return [
        _judge(completion, lambda text, answer=answer: compare(text, str(answer)))
        for completion, answer in zip(completions, answers, strict=True)
    ]


def exact_match_reward(completions: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """[B] float32, 1 where the completion is the answer; see `exact_match_verdicts`."""
    return rewards_of(exact_match_verdicts(completions, answers))


# Run by a Python of its own, as the engine of `re` cannot be stopped from another thread. One text a line, as its
# character codes in hex; one answer a line. The alarm interrupts a match in the midst.
_MATCHER = """
import re, signal, sys
class Late(Exception):
    pass
def ring(*_):
    raise Late
signal.signal(signal.SIGALRM, ring)
pattern = re.compile(bytes.fromhex(sys.argv[1]).decode("utf-8", "surrogatepass"))
for line in sys.stdin:
    text = bytes.fromhex(line.strip()).decode("utf-8", "surrogatepass")
    try:
        signal.setitimer(signal.ITIMER_REAL, float(sys.argv[2]))
        answer = "yes" if pattern.fullmatch(text) else "no"
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Late:
        answer = "late"
    print(answer, flush=True)
"""
_FORMAT_ANSWERS = {
    "yes": _right("the format is right"),
    "no": _wrong("the text does not match the pattern"),
    "late": _wrong(f"matching took longer than {FORMAT_SECONDS} s"),
}


def format_verdicts(completions: Sequence[str], pattern: str) -> list[Verdict]:
    r"""Whether the whole of each completion matches a regular expression of `re`, e.g. ``(?s)<think>.*</think>.*``.

    Matching happens in another process and takes at most `FORMAT_SECONDS` a text, so that ``(a+)+b`` on a long row of
    a's gets 0 and a reason instead of hanging.

    Raises:
      InputError: the pattern does not compile.
    """
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(
            f"the format pattern {pattern!r} is no regular expression ({error}): mend it"
        ) from error
    verdicts = [_judge(completion, lambda text: _right("")) for completion in completions]
    places = [place for place, verdict in enumerate(verdicts) if verdict.reward]
    while places:
        answered = _match([completions[place] for place in places], pattern)
        for place, answer in zip(places, answered, strict=False):
            verdicts[place] = _FORMAT_ANSWERS[answer]
        places = places[len(answered) :]
        if places:  # the process died on this one
            verdicts[places[0]] = _wrong("the regular expression's process died on it")
            places = places[1:]
    return verdicts


def _match(texts: Sequence[str], pattern: str) -> list[str]:
    """An answer for each text, or for the first few of them where the process did not live to answer the next."""
    codes = [text.encode("utf-8", "surrogatepass").hex() for text in [pattern, *texts]]
    command = [sys.executable, "-I", "-S", "-c", _MATCHER, codes[0], str(FORMAT_SECONDS)]
    # A generous start, as the time of each match is kept inside.
    seconds = 10 + len(texts) * 2 * FORMAT_SECONDS
    try:
        ended = subprocess.run(
            command, input="\n".join(codes[1:]) + "\n", text=True, capture_output=True, timeout=seconds
        )
        output = ended.stdout
    except subprocess.TimeoutExpired as error:
        output = (error.output or b"").decode() if not isinstance(error.output, str) else error.output
    return [line for line in output.split("\n") if line in _FORMAT_ANSWERS][: len(texts)]


def format_reward(completions: Sequence[str], pattern: str) -> np.ndarray:
    """[B] float32, 1 where the whole completion matches; see `format_verdicts`."""
    return rewards_of(format_verdicts(completions, pattern))


def game24_verdicts(completions: Sequence[str], puzzles: Sequence[str]) -> list[Verdict]:
    """Whether each completion makes 24 of the puzzle's numbers ("1 1 4 6"), each used exactly once.

    The sum is what follows the last "answer is", "Answer:", "A:" or "####", else the last line; from the first "=" on
    it is not read. It may hold + - * / and brackets, and is worked out in fractions: nothing is evaluated as code.

    Raises:
      ValueError: not one puzzle for each completion.
    """
    check_pairing("puzzles", completions, puzzles)
    return [
        _judge(completion, lambda text, puzzle=puzzle: _game24_verdict(text, str(puzzle)))
        for completion, puzzle in zip(completions, puzzles, strict=True)
    ]


def game24_reward(completions: Sequence[str], puzzles: Sequence[str]) -> np.ndarray:
    """[B] float32, 1 where 24 is made of the puzzle's numbers; see `game24_verdicts`."""
    return rewards_of(game24_verdicts(completions, puzzles))


_SUM_MARK = re.compile(r"(?:[Aa]nswer(?:\sis)?|\bA)\s?:|[Aa]nswer\sis\b|####")


def _game24_verdict(completion: str, puzzle: str) -> Verdict:
    numbers = [int(digits) for digits in re.findall(r"(?<![0-9])[0-9]{1,9}(?![0-9])", puzzle)]
    if not numbers:
        return _wrong("the puzzle names no numbers")
    text = completion.rstrip()
    starts = [mark.end() for mark in _SUM_MARK.finditer(text)]
    line = text[starts[-1] :].lstrip().split("\n", 1)[0] if starts else text.rsplit("\n", 1)[-1]
    written = line.split("=", 1)[0].strip(" \t\r*`$.:\\")
    try:
        worked = expressions.work_out(written)
    except expressions.NotAnExpression as error:
        return _wrong(str(error))
    if Counter(worked.numbers) != Counter(numbers):
        return _wrong(f"the numbers {sorted(worked.numbers)} were used, {sorted(numbers)} were given"[:300])
    if worked.value != _TARGET:
        return _wrong(f"the sum is {_show(worked.value)}, not {_TARGET}")
    return _right(f"{written} is {_TARGET}")


_FENCE = re.compile(r"```[ \t]{0,3}(?:python|py|Python)?[ \t]{0,3}\n(.*?)(?:\n```|\Z)", re.DOTALL)


def unit_test_verdicts(
    completions: Sequence[str],
    tests: Sequence[str],
    *,
    limits: sandbox.Limits | None = None,
    workers: int | None = None,
) -> list[Verdict]:
    """Whether the Python program in each completion passes its tests; see `sandbox.run` for what it may do.

    The program is the last fenced block (three backticks, "python" or nothing), else the whole text. Tests are Python
    source that sees the program's names and raises where it is not content, e.g. ``assert add(2, 3) == 5``.

    Args:
      completions: [B] texts.
      tests: [B] sources; one without a statement gives 0, as nothing would be tested.
      limits: of each program; `sandbox.Limits()` where None.
      workers: programs at a time; the number of processor cores where None.

    Raises:
      ValueError: not one source of tests for each completion.
      InputError: this machine cannot cage a process.
    """
    check_pairing("tests", completions, tests)
    limits = limits or sandbox.Limits()

    def judge(pair: tuple[object, object]) -> Verdict:
        completion, source = pair
        if not str(source).strip():
            return _wrong("there are no tests")
        return _judge(completion, lambda text: _program_verdict(text, str(source), limits))

    with ThreadPoolExecutor(max_workers=workers or os.cpu_count()) as pool:
        return list(pool.map(judge, zip(completions, tests, strict=True)))


def unit_test_reward(
    completions: Sequence[str],
    tests: Sequence[str],
    *,
    limits: sandbox.Limits | None = None,
    workers: int | None = None,
) -> np.ndarray:
    """[B] float32, 1 where all tests pass; see `unit_test_verdicts`."""
    return rewards_of(unit_test_verdicts(completions, tests, limits=limits, workers=workers))


def _program_verdict(completion: str, tests: str, limits: sandbox.Limits) -> Verdict:
    blocks = _FENCE.findall(completion)
    return sandbox.run(blocks[-1] if blocks else completion, tests, limits=limits)
