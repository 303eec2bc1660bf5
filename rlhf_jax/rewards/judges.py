"""A judge as reward: a program that is asked over a pipe, for a group of responses at a time; imports errors only.

The judge is started once and answers each line that it reads with one line that it writes, both JSON:

    {"prompt": "...", "responses": ["...", "..."]}  ->  {"scores": [0.5, -1.0]}

What it fails to answer gets no verdict: nothing is learned from that group, and why is counted. One that died, or that
is late and would answer the next question with the answer to this one, is started anew.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import selectors
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence

import numpy as np

from rlhf_jax.errors import InputError

# Why there is no verdict, as metrics name it.
REASONS = ("late", "died", "malformed", "wrong_count", "not_finite", "too_long")
_LONGEST_ANSWER = 1 << 20
_SHOWN = 80


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """What a judge said of B responses.

    scores: [B] float32, 0 where there is no verdict. has_verdict: [B] bool. reasons: each of ``REASONS`` -> the number
    of groups without a verdict for it.
    """

    scores: np.ndarray
    has_verdict: np.ndarray
    reasons: Mapping[str, int]


class NoVerdict(Exception):
    """Why a judge's answer is none: ``reason``, one of ``REASONS``, and a message for whoever must mend it."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def parse_answer(line: bytes, count: int) -> list[float]:
    """The ``count`` finite scores of a judge's line.

    Raises:
      NoVerdict: it is not JSON, has no list of scores, too few or too many of them, or one that is not finite.
    """
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        raise NoVerdict("malformed", f"answered {_shown(line)}, which is not JSON") from None
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise NoVerdict("malformed", f'answered {_shown(line)}, which has no list of "scores"')
    if len(scores) != count:
        raise NoVerdict("wrong_count", f"gave {len(scores)} scores for {count} responses")
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise NoVerdict(
                "malformed", f"gave the score {_shown(json.dumps(score).encode())}, which is no number"
            )
        # A float32 holds it later: what is too large for that is infinite there.
        if not abs(score) <= float(np.finfo(np.float32).max):
            raise NoVerdict(
                "not_finite", f"gave the score {_shown(str(score).encode())}, which is not finite"
            )
    return [float(score) for score in scores]


def _shown(content: bytes) -> str:
    text = content[: _SHOWN + 1].decode("utf-8", "replace").strip()
    return repr(text[:_SHOWN] + ("..." if len(content) > _SHOWN else ""))


class CommandJudge:
    """A judge in a process of its own; see the module. What it writes to its standard error is shown as it is."""

    def __init__(self, command: str, *, seconds: float, failures: int):
        """Starts nothing yet.

        Args:
          command: with its arguments, as a shell would divide it; no shell runs it.
          seconds: for one question, from the first byte sent to the answer's end; the start of the program counts.
          failures: so many questions in a row without a verdict end the run.

        Raises:
          InputError: the command cannot be divided, or is empty.
        """
        try:
            self._arguments = shlex.split(command)
        except ValueError as error:
            raise InputError(
                f"the judge's command {command!r} cannot be read ({error}); mend its quotes"
            ) from None
        if not self._arguments:
            raise InputError("the judge's command is empty; give the program and its arguments")
        self._command, self._seconds, self._failures = command, seconds, failures
        self._process: subprocess.Popen | None = None
        self._failed = 0

    def scores(self, prompt: str, responses: Sequence[str]) -> list[float]:
        """One finite score a response.

        Raises:
          NoVerdict: see `parse_answer`; or it was late, or died.
          InputError: it cannot be started, or has given no verdict so many times in a row.
        """
        question = json.dumps({"prompt": prompt, "responses": list(responses)}).encode() + b"\n"
        try:
            found = parse_answer(self._ask(question), len(responses))
        except NoVerdict as failure:
            self._failed += 1
            if self._failed >= self._failures:
                self.close()
                raise InputError(
                    f"the judge {self._command!r} gave no verdict {self._failed} times in a row; the last time, on the "
                    f"prompt {_shown(prompt.encode('utf-8', 'replace'))}, it {failure}; mend it, or allow more with "
                    "config.judge.failures"
                ) from failure
            raise
        self._failed = 0
        return found

    def close(self) -> None:
        """Ends the process, and whatever it has started in its group."""
        process, self._process = self._process, None
        if process is None:
            return
        # Also where it died by itself: what it had started lives on, and keeps the group's number from others.
        # Popen's own context closes the pipes and waits.
        with process, contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def _ask(self, question: bytes) -> bytes:
        deadline = time.monotonic() + self._seconds
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = self._start()
        try:
            return _exchange(self._process, question, deadline, self._seconds)
        except NoVerdict:
            self.close()  # an answer that comes later would be taken for that to the next question
            raise

    def _start(self) -> subprocess.Popen:
        try:
            process = subprocess.Popen(
                self._arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            raise InputError(
                f"the judge {self._command!r} cannot be started: {error.strerror}; give a program that can"
            ) from error
        os.set_blocking(process.stdin.fileno(), False)
        return process


def _exchange(process: subprocess.Popen, question: bytes, deadline: float, seconds: float) -> bytes:
    """Sends a line and reads a line, each as the other side is ready for it.

    Raises:
      NoVerdict: the deadline passed, the process closed its side, or the line has no end.
    """
    unsent, answer = memoryview(question), bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if selector.select(0) and os.read(process.stdout.fileno(), 1):
            raise NoVerdict("malformed", "answered more than one line to the question before")
        selector.register(process.stdin, selectors.EVENT_WRITE)
        while not answer.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0:
                raise NoVerdict("late", f"did not answer within {seconds:g} s")
            for key, _ in selector.select(left):
                if key.fileobj is process.stdin:
                    try:
                        unsent = unsent[os.write(process.stdin.fileno(), unsent[:65536]) :]
                    except BrokenPipeError:
                        raise NoVerdict("died", _end_of(process)) from None
                    if not unsent:
                        selector.unregister(process.stdin)
                    continue
                chunk = os.read(process.stdout.fileno(), 65536)
                if not chunk:
                    raise NoVerdict("died", _end_of(process))
                answer += chunk
                if len(answer) > _LONGEST_ANSWER:
                    raise NoVerdict("malformed", f"answered more than {_LONGEST_ANSWER} bytes")
    if unsent or answer.count(b"\n") > 1:
        raise NoVerdict("malformed", "answered more than one line to a question, or before it had read it")
    return bytes(answer)


def _end_of(process: subprocess.Popen) -> str:
    try:
        code = process.wait(1.0)
    except subprocess.TimeoutExpired:
        return "closed its standard input or output"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"


def judge_groups(
    judge: CommandJudge, prompts: Sequence[str], responses: Sequence[str], group_size: int
) -> Judged:
    """The judge's scores of B responses; ``group_size`` of them after one another are a group, and one question.

    prompts, responses: B of each; those of a group have one prompt.

    Raises:
      InputError: see `CommandJudge.scores`.
    """
    scores, has_verdict = np.zeros(len(prompts), np.float32), np.zeros(len(prompts), bool)
    reasons = collections.Counter()
    for start in range(0, len(prompts), group_size):
        group = slice(start, start + group_size)
        try:
            scores[group] = judge.scores(prompts[start], responses[group])
            has_verdict[group] = True
        except NoVerdict as failure:
            reasons[failure.reason] += 1
    return Judged(
        scores=scores, has_verdict=has_verdict, reasons={reason: reasons[reason] for reason in REASONS}
    )
