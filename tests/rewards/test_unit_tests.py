"""Programs that nobody vouches for: the honest pass, the others get nothing, a reason, and leave no trace."""

import os
import pathlib
import re
import sys

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.rewards import sandbox, verifiers

if sys.platform != "linux" or os.uname().machine != "x86_64":
    pytest.skip("programs can be caged on Linux, x86-64 only", allow_module_level=True)

ADD = "def add(a, b):\n    return a + b\n"
TESTS = "assert add(2, 3) == 5\nassert add(-1, 1) == 0"
QUICK = sandbox.Limits(seconds=10.0)


def caught(statement, setup=""):
    """A program that does something forbidden, catches whatever comes of it, and is right all the same."""
    return f"{setup}\ntry:\n    {statement}\nexcept BaseException:\n    pass\n{ADD}"


HONEST = {
    "plain": ADD,
    "fenced": f"Here you are:\n```python\n{ADD}```\nand this is how it works.",
    "last block": f"```python\ndef add(a, b): return 0\n```\nno:\n```\n{ADD}\n```",
    "a megabyte": ADD + "#" * 1_000_000,
    "says things": "import sys\nprint('hello')\nprint('err', file=sys.stderr)\n" + ADD,
    "libraries": "import math, json, re, random, itertools, datetime, decimal, asyncio, tempfile, zoneinfo\n"
    + ADD,
    "cleans up": "import atexit\natexit.register(print, 'bye')\n" + ADD,
}
WRONG = {
    "a wrong sum": ("def add(a, b): return a - b", "AssertionError"),
    "nothing": ("", "NameError"),
    "no Python": ("def add(:", "SyntaxError"),
    "a null byte": ("x = '\x00'\n" + ADD, "null bytes"),
    "a surrogate": ("x = '\ud800'\n" + ADD, "SyntaxError"),
    "deep brackets": ("(" * 100_000, "SyntaxError|MemoryError"),
    "recursion": ("def f(): f()\nf()", "RecursionError"),
    "exit": ("import sys; sys.exit(0)", "SystemExit"),
    "hard exit": ("import os; os._exit(0)", "exited with status 0"),
    "a crash": ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
    "an error that cannot be said": ("class E(Exception):\n def __str__(self): 1/0\nraise E", "E"),
    "one that reads its tests": ("print(open('tests.py').read())\n" + ADD, "FileNotFoundError"),
    "a fork": (caught("os.fork()", "import os"), "started a process"),
    "a fork behind Python's back": (caught("ctypes.CDLL(None).fork()", "import ctypes"), "not allowed"),
    "a thread": (caught("threading.Thread(target=print).start()", "import threading"), "thread"),
    "a shell": (caught("os.system('true')", "import os"), "started a process"),
    "a program": (caught("subprocess.run(['true'])", "import subprocess"), "started a process"),
    "a socket": (caught("socket.socket()", "import socket"), "opened a socket"),
    "a socket behind Python's back": (caught("ctypes.CDLL(None).socket(2, 1, 0)", "import ctypes"), "not allowed"),
    "a signal by way of a file": (
        "import fcntl, os\nfcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())\n" + ADD,
        "PermissionError",
    ),
    "a file's attributes": (
        "import fcntl\nfcntl.ioctl(open('program.py'), 0x40086602, b'\\0' * 8)\n" + ADD,
        "PermissionError",
    ),
    "a word from inside": (
        "import os\nfor i in range(3, 64):\n  try: os.write(i, b'CAGE x')\n  except OSError: pass\n" + ADD,
        "CAGE x",
    ),
    "a signal": (caught("os.kill(os.getppid(), 0)", "import os"), "sent a signal"),
    "memory at once": ("x = bytearray(1 << 34)\n" + ADD, "MemoryError"),
    "memory bit by bit": ("x = []\nwhile True: x.append(bytearray(1 << 20))", "MemoryError"),
    "a mapping": ("import mmap; mmap.mmap(-1, 1 << 34)", "OSError"),
    "endless words": ("while True: print('x' * 1000)", "printed more than"),
    "endless errors": ("import os\nwhile True: os.write(2, b'x' * 1000)", "printed more than"),
    "more memory than allowed": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))\n" + ADD,
        "PermissionError|ValueError",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def verdicts():
    """Everything above, each program run once."""
    programs = HONEST | {name: program for name, (program, _) in WRONG.items()}
    found = verifiers.unit_test_verdicts(
        list(programs.values()), [TESTS] * len(programs), limits=QUICK, workers=2
    )
    return dict(zip(programs, found, strict=True))


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_program_passes(verdicts, name):
    assert verdicts[name].reward == 1.0, verdicts[name]


@pytest.mark.parametrize("name", WRONG)
def test_any_other_gets_nothing_and_a_reason(verdicts, name):
    assert verdicts[name].reward == 0.0 and re.search(WRONG[name][1], verdicts[name].reason), verdicts[name]


@pytest.mark.parametrize(
    "program",
    [
        "import time; time.sleep(600)",
        "while True: pass",
        "import os\nos.close(1); os.close(2)\nwhile True: pass",
    ],
)
def test_one_that_never_ends_is_ended(program):
    (verdict,) = verifiers.unit_test_verdicts([program], [TESTS], limits=sandbox.Limits(seconds=0.5))
    assert verdict.reward == 0.0 and verdict.reason == "ran longer than 0.5 s"


FILE_TRICKS = {
    "write": "open({path!r}, 'w').write('x')",
    "append": "open({path!r}, 'a').write('x')",
    "create": "os.close(os.open({path!r}, os.O_CREAT | os.O_WRONLY))",
    "remove": "os.remove({path!r})",
    "rename": "os.rename({path!r}, {path!r} + '2')",
    "chmod": "os.chmod({path!r}, 0)",
    "make a directory": "os.mkdir({path!r} + '2')",
    "truncate": "os.truncate({path!r}, 0)",
    "link": "os.symlink('/', {path!r} + '2')",
    "write behind Python's back": "ctypes.CDLL(None).open({path!r}.encode(), 0o1101, 0o644)",
    "remove behind Python's back": "ctypes.CDLL(None).unlink({path!r}.encode())",
    "write in its own directory": "open('x', 'w').write('x')",
    "a system call by number": "ctypes.CDLL(None).syscall(87, {path!r}.encode())",
    "one of the 32-bit table": "ctypes.CDLL(None).syscall(0x40000000 + 87, {path!r}.encode())",
}


def test_files_are_left_as_they_were(tmp_path):
    precious = tmp_path / "precious.txt"
    precious.write_text("keep me")
    programs = [
        caught(trick.format(path=str(precious)), "import os, ctypes") for trick in FILE_TRICKS.values()
    ]
    found = verifiers.unit_test_verdicts(programs, [TESTS] * len(programs), limits=QUICK, workers=2)
    assert [verdict.reward for verdict in found] == [0.0] * len(programs), found
    assert precious.read_text() == "keep me" and [p.name for p in tmp_path.iterdir()] == ["precious.txt"]
    assert precious.stat().st_mode & 0o777 != 0


def test_tests_that_test_nothing_reward_nothing():
    assert verifiers.unit_test_verdicts([ADD], ["  \n"])[0].reason == "there are no tests"


def test_broken_tests_are_a_reason_too():
    reward = verifiers.unit_test_reward(
        [ADD, ADD, None], ["assert add(", "import sys; sys.exit(0)", "assert True"]
    )
    assert reward.tolist() == [0, 0, 0]


def test_the_temporary_directory_is_gone():
    reason = sandbox.run("", "import os\nraise OSError(os.getcwd())", limits=QUICK).reason
    directory = pathlib.Path(reason.removeprefix("OSError: "))
    assert "rlhf_jax_sandbox_" in directory.name and not directory.exists()


def test_the_environment_is_not_passed_on(monkeypatch):
    monkeypatch.setenv("SECRET_OF_MINE", "hush")
    verdict = sandbox.run("import os", "assert set(os.environ) <= {'HOME', 'LC_CTYPE'}, 'seen'", limits=QUICK)
    assert verdict.reward == 1.0, verdict


def test_where_no_cage_can_be_built_nothing_is_run(monkeypatch, tmp_path):
    child = tmp_path / "child.py"
    source = pathlib.Path(sandbox._CHILD).read_text().replace('"x86_64"', '"another"')
    child.write_text(source)
    monkeypatch.setattr(sandbox, "_CHILD", child)
    with pytest.raises(InputError, match="cannot be run safely here .linux on x86_64."):
        verifiers.unit_test_reward([f"open({str(tmp_path / 'x')!r}, 'w')"], ["1"])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("field", [{"seconds": 0.0}, {"memory_mib": 1}, {"output_bytes": -1}])
def test_limits_that_nothing_could_meet_are_refused(field):
    with pytest.raises(InputError, match=next(iter(field))):
        sandbox.Limits(**field)
