"""Runs one program inside a cage, and says how it ended; imports the standard library only. A script, run by `sandbox`.

It is started by path in isolated mode (``python -I -S``), never imported, so that neither the program nor this file
sees the project. Order matters: limits, then the kernel's filter, then the program, then its tests, and the secret is
read last of all.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import resource
import struct
import sys
import traceback

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 1, 38, 22, 2
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | 1  # the last answers EPERM
_ARCHITECTURE = 0xC000003E  # x86-64
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_OFFSET, _ARCHITECTURE_OFFSET, _ARGUMENTS_OFFSET = 0, 4, 16
_X32 = 0x40000000
# Write-only, read-write, create, truncate, append, and the bit of O_TMPFILE.
_WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000 | 0o20000000
# System calls of x86-64 (arch/x86/entry/syscalls/syscall_64.tbl) that computing and reading files needs:
# read write close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn
# pread64 readv writev access select sched_yield mremap madvise dup nanosleep getitimer alarm setitimer getpid
# exit uname getcwd readlink gettimeofday getrlimit getrusage sysinfo times getuid getgid geteuid getegid getppid
# sigaltstack statfs fstatfs arch_prctl gettid time futex sched_getaffinity getdents64 clock_gettime clock_getres
# clock_nanosleep exit_group newfstatat readlinkat faccessat pselect6 ppoll set_robust_list getrandom statx rseq
# faccessat2
_ALLOWED = (
    0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 19, 20, 21, 23, 24, 25, 28, 32, 35, 36, 37, 38, 39, 60,
    63, 79, 89, 96, 97, 98, 99, 100, 102, 104, 107, 108, 110, 131, 137, 138, 158, 186, 201, 202, 204, 217, 228, 229,
    230, 231, 262, 267, 269, 270, 271, 273, 318, 332, 334, 439,
)  # fmt: skip
# Those that only a program with other intentions makes; the process dies, whatever it catches: socket connect accept
# sendto bind listen socketpair clone fork vfork execve kill rename mkdir rmdir creat link unlink symlink chmod chown
# truncate ftruncate ptrace mknod mount tkill tgkill, their *at forms, clone3, execveat, memfd_create, pidfd_open.
_DEADLY = (
    41, 42, 43, 44, 49, 50, 53, 56, 57, 58, 59, 62, 82, 83, 84, 85, 86, 87, 88, 90, 92, 76, 77, 101, 133, 165, 200,
    234, 258, 259, 260, 263, 264, 265, 266, 268, 316, 319, 322, 434, 435,
)  # fmt: skip
_OPEN, _OPENAT = 2, 257
# Calls with many purposes (number, argument that says which), and the harmless ones: ioctl to ask whether a file is a
# terminal (TCGETS, TIOCGWINSZ, FIOCLEX, FIONBIO), and fcntl to duplicate and to read or set flags.
_PURPOSES = (
    (16, 1, (0x5401, 0x5413, 0x5451, 0x5421)),
    (72, 1, (0, 1, 2, 3, 4, 1030)),
)
# What Python itself announces before it happens: the reason comes from here, the wall is the kernel's.
_ANNOUNCED = {
    "os.fork": "started a process",
    "os.forkpty": "started a process",
    "os.posix_spawn": "started a process",
    "os.exec": "started a process",
    "os.system": "started a process",
    "subprocess.Popen": "started a process",
    "_thread.start_new_thread": "started a thread",
    "socket.__new__": "opened a socket",
    "os.kill": "sent a signal",
    "os.remove": "removed a file",
    "os.rename": "renamed a file",
    "os.mkdir": "made a directory",
    "os.rmdir": "removed a directory",
    "os.truncate": "wrote to a file",
    "os.link": "linked a file",
    "os.symlink": "linked a file",
    "os.chmod": "changed a file's mode",
}


def limit(seconds: float, memory_bytes: int) -> None:
    """Sets limits that the process cannot lift: memory, processor time, files, processes, descriptors, core dumps."""
    for name, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_FSIZE, 0),
        # Counts every process of the user and does not bind root: the filter below is what forbids processes.
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (value, value))


def install_filter() -> str | None:
    """Asks the kernel to let only `_ALLOWED` system calls through (seccomp); returns why it could not, or None."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return f"{sys.platform} on {os.uname().machine}"
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    library.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in _filter())
    buffer = ctypes.create_string_buffer(code)
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer)))
    if library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or library.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program), 0, 0
    ):
        return f"the kernel refused the filter: {os.strerror(ctypes.get_errno())}"
    return None


def _filter() -> list[tuple[int, int, int, int]]:
    """Berkeley packet filter instructions (code, jump if true, jump if false, constant)."""
    code = [
        (_LOAD, 0, 0, _ARCHITECTURE_OFFSET),
        (_JUMP_EQUAL, 1, 0, _ARCHITECTURE),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_OFFSET),
        (_JUMP_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
    ]
    for numbers, action in ((_ALLOWED, _ALLOW), (_DEADLY, _KILL)):
        for number in numbers:
            code += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, action)]
    for number, argument in ((_OPEN, 1), (_OPENAT, 2)):
        code += [
            (_JUMP_EQUAL, 0, 4, number),
            (_LOAD, 0, 0, _ARGUMENTS_OFFSET + 8 * argument),
            (_JUMP_SET, 0, 1, _WRITING),
            (_RETURN, 0, 0, _KILL),
            (_RETURN, 0, 0, _ALLOW),
        ]
    for number, argument, purposes in _PURPOSES:
        code += [
            (_JUMP_EQUAL, 0, 2 + 2 * len(purposes), number),
            (_LOAD, 0, 0, _ARGUMENTS_OFFSET + 8 * argument),
        ]
        for purpose in purposes:
            code += [(_JUMP_EQUAL, 0, 1, purpose), (_RETURN, 0, 0, _ALLOW)]
        code += [(_RETURN, 0, 0, _REFUSE)]
    return [*code, (_RETURN, 0, 0, _REFUSE)]


def announce(report: int) -> None:
    """From now on what the program must not do ends it, with the reason on ``report``."""

    def hook(event: str, arguments: tuple) -> None:
        reason = _ANNOUNCED.get(event)
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
            reason = "opened a file for writing"
        if reason:
            os.write(report, reason.encode())
            os._exit(1)

    sys.addaudithook(hook)


def load(name: str, path: str, given: dict[str, object]) -> dict[str, object]:
    """Runs a file as a module of which ``given`` are globals already; returns its globals."""
    loader = importlib.machinery.SourceFileLoader(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    vars(module).update({key: value for key, value in given.items() if not key.startswith("__")})
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return vars(module)


def main() -> None:
    """Arguments: seconds, bytes of memory, and the descriptors of tests and secret (to read) and report (to write)."""
    seconds, memory_bytes, tests, secret, report = float(sys.argv[1]), *map(int, sys.argv[2:6])
    sys.argv = sys.argv[:1]
    limit(seconds, memory_bytes)
    trouble = install_filter()
    if trouble:
        os.write(report, b"CAGE " + os.read(secret, 64) + trouble.encode())
        return
    announce(report)
    try:
        load("tests", f"/proc/self/fd/{tests}", load("program", "program.py", {}))
        os.write(report, os.read(secret, 64))
    except BaseException as error:  # SystemExit too: the program must reach the end of its tests
        said = traceback.format_exception_only(error)[-1].strip()
        os.write(report, (said or type(error).__name__)[:400].encode("utf-8", "replace"))
    os._exit(0)


if __name__ == "__main__":
    main()
