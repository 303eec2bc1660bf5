"""Runs a Python program that nobody vouches for, in a process with its hands tied; imports errors and verdicts.

Linux on x86-64, as any user: the kernel itself (seccomp, resource limits) refuses the process everything but computing,
reading files and writing to its two pipes. Another system has no such wall here, so that there the program is not run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time

from rlhf_jax.errors import InputError, check_range
from rlhf_jax.rewards.verdicts import Verdict

_CHILD = pathlib.Path(__file__).with_name("sandbox_child.py")
_MEBIBYTE = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use.

    seconds: wall-clock time, at least 0.05. memory_mib: address space in MiB, at least 64 (Python itself needs 30).
    output_bytes: of what it prints, both streams together.
    """

    seconds: float = 3.0
    memory_mib: int = 256
    output_bytes: int = 65536

    def __post_init__(self) -> None:
        check_range(self, "seconds", at_least=0.05, at_most=3600)
        check_range(self, "memory_mib", at_least=64)
        check_range(self, "output_bytes", at_least=0)


def run(program: str, tests: str, *, limits: Limits) -> Verdict:
    """1 if ``tests``, which sees the names of ``program``, runs to its end, else 0 and what stopped it.

    Both are Python source, and neither is trusted.

    The process has only the standard library, an empty environment, and a directory of its own that is removed. It
    cannot write or remove files, open sockets, start processes or threads, or send signals: an attempt ends it. It can
    read what the user can read. A program that exits early has not passed; one that is written to find the harness
    inside its own process can still forge a pass.

    Raises:
      InputError: this machine cannot cage a process.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf_jax_sandbox_") as directory:
        for name, source in (("program.py", program), ("tests.py", tests)):
            (pathlib.Path(directory) / name).write_bytes(source.encode("utf-8", "surrogatepass"))
        tests_file = os.open(pathlib.Path(directory) / "tests.py", os.O_RDONLY)
        try:
            # Open and yet nowhere to be found, so that a program cannot simply read what it is asked.
            (pathlib.Path(directory) / "tests.py").unlink()
            return _run_child(directory, tests_file, limits)
        finally:
            os.close(tests_file)


def _run_child(directory: str, tests: int, limits: Limits) -> Verdict:
    secret = secrets.token_bytes(32)
    with contextlib.ExitStack() as stack:
        secret_out, secret_in = _pipe(stack)
        report_out, report_in = _pipe(stack)
        os.write(secret_in, secret)
        memory = limits.memory_mib * _MEBIBYTE
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_CHILD), str(limits.seconds), str(memory), str(tests),
             str(secret_out), str(report_in)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=directory,
            env={"HOME": directory},  # else the standard library asks a name service, over a socket
            pass_fds=(tests, secret_out, report_in),
            start_new_session=True,
        )  # fmt: skip
        with process:
            try:
                stopped = _watch(process, limits)
            finally:
                process.kill()  # it has no children: it could not start any
            code = process.wait()
        os.set_blocking(report_out, False)
        try:
            report = os.read(report_out, 4096)
        except BlockingIOError:
            report = b""
    if report.startswith(b"CAGE " + secret):
        trouble = report.removeprefix(b"CAGE " + secret).decode()
        raise InputError(
            f"programs cannot be run safely here ({trouble}): unit tests need Linux on x86-64 with seccomp"
        )
    passed = stopped is None and report == secret
    reason = stopped or ("all tests passed" if passed else _why(report, code))
    return Verdict(reward=float(passed), reason=reason)


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    ends = os.pipe()
    for end in ends:
        stack.callback(os.close, end)
    return ends


def _why(report: bytes, code: int) -> str:
    said = "".join(c if c.isprintable() else " " for c in report.decode("utf-8", "replace"))
    if said:
        return said
    if code == -signal.SIGSYS:
        return "made a system call that is not allowed (to a file, a process or thread, a socket, a signal)"
    if code == -signal.SIGXCPU or code == -signal.SIGKILL:
        return "ran out of processor time or memory"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"exited with status {code} before its tests were over"


def _watch(process: subprocess.Popen, limits: Limits) -> str | None:
    """Reads and forgets what is printed until the program ends or meets a limit; returns which limit."""
    deadline = time.monotonic() + limits.seconds
    late = f"ran longer than {limits.seconds:g} s"
    total = 0
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stderr, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return late
            for key, _ in selector.select(left):
                chunk = os.read(key.fd, 65536)
                if not chunk:
                    selector.unregister(key.fileobj)
                total += len(chunk)
                if total > limits.output_bytes:
                    return f"printed more than {limits.output_bytes} bytes"
    try:
        process.wait(max(deadline - time.monotonic(), 0.01))
    except subprocess.TimeoutExpired:
        return late
    return None
