"""One model-written program in one child process, which can compute and report and nothing else.

A child is forked by a keeper (rubric/sandbox_child.py): a bare interpreter (`-I -S -B`) that has no environment
variable and no descriptor of ours, has the usual modules loaded, and never runs a program itself. Each program gets a
child of its own, which is killed when it reports, at `wall_s`, or at a limit: processor time, address space, open
files; no processes, no threads, no byte written to a file. On Linux with libseccomp (pip install pyseccomp) a filter
then allows about fifty system calls: memory, clocks, sleeping, randomness, and reading and writing what is open, which
is the pipe of the report. So no file can be opened, not even the program's own, no socket made, no signal sent or
handled, nothing started. Without libseccomp a hook on Python's audit events refuses the same, which native code may get
past; `in_force` says in one line which it is. As root the child also becomes a user of its own, and the keeper leaves
the network.

The program's own output goes nowhere. Return values come back as JSON on a pipe behind a random word, at most 1 MiB;
what they should be is never sent to the child, so a forged result is worth no more than a guess.

Only the standard library can be imported: what the program's import statements name, and what the keeper has loaded.
POSIX only; tried on Linux. Left out: namespaces of files and processes, which need rights that containers seldom give.
"""

import atexit
import errno
import functools
import json
import os
import secrets
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

CPU_S = 2  # seconds of processor time, whole ones: a graded function needs milliseconds
WALL_S = 4.0  # seconds; over CPU_S so that a busy machine does not fail a right program
MEMORY_BYTES = 512 << 20  # of address space, the interpreter's own included
START_S = 30.0  # seconds until a keeper answers
GRACE_S = 5.0  # seconds beyond a program's limit after which its keeper is taken for dead
OUTPUT_BYTES = 1 << 20  # of a report; the keeper has the same number,
HEAD = struct.Struct(">IId")  # and the same head of messages: bytes of the request, of its tests, seconds it may take
_KEEPER = str(Path(__file__).with_name("sandbox_child.py"))

# What an interpreter needs to compute and to report. Files, sockets, processes, signals and users are not in it.
ALLOWED_CALLS = (
    "brk mmap munmap mremap mprotect madvise membarrier "  # memory
    "read readv pread64 write writev lseek close fstat poll ppoll select pselect6 "  # what is open already
    "clock_gettime clock_getres gettimeofday time times getrusage nanosleep clock_nanosleep restart_syscall "
    "getrandom futex futex_time64 sched_yield sched_getaffinity getcpu set_robust_list rseq rt_sigreturn sigaltstack "
    "getpid gettid getuid geteuid getgid getegid exit exit_group"
).split()


class Call(NamedTuple):
    returned: bool  # False: it raised, or returned something that JSON cannot hold
    value: object  # the returned value, tuples as lists; else the name of the exception type


class Ran(NamedTuple):
    program: int  # index of the program that was run: the first of `programs` that compiles; -1 for none
    calls: tuple[Call, ...]  # one for each entry of `calls`; empty when there is a failure
    failure: str  # why there are no calls, "" when there are


def run(
    programs: Sequence[str], entry: str, calls: Sequence[list], *, cpu_s: int = CPU_S, wall_s: float = WALL_S
) -> Ran:
    """Executes the first program that compiles, then `entry(*args)` for each `args` of `calls`.

    Never raises for what a program does. Raises OSError when no process can be started. Safe to call from threads:
    each call that runs at the same time has a keeper, and so at most one child, of its own.
    """
    asked = {"programs": [*programs], "entry": entry, "calls": [[*args] for args in calls]}
    return _run(asked, None, len(calls), cpu_s, wall_s)[0]


def run_tests(
    programs: Sequence[str],
    entry: str,
    tests: Sequence[str],
    setup: str = "",
    *,
    cpu_s: int = CPU_S,
    wall_s: float = WALL_S,
) -> Ran:
    """The same for tests written as statements (`assert f(2) == 3`), run one after another in a process of their own,
    where `entry` calls the program in another and gets plain values (rubric/sandbox_tests.py).

    `setup` is run before the tests, on their side only. A test has `returned` when it raised nothing; else `value` is
    the name of the exception, AssertionError or what the function raised.
    """
    asked, against = {"programs": [*programs], "entry": entry}, {"entry": entry, "tests": [*tests], "setup": setup}
    return _run(asked, against, len(tests), cpu_s, wall_s)[0]


def in_force() -> str:
    """One line: what keeps a program in on this machine. Runs a program to find out."""
    force = _run({"programs": ["def f(): pass"], "entry": "f", "calls": [[]]}, None, 1)[1]
    kept = _keepers.borrow()
    try:
        force = [*force, *filter(None, [kept.network])]
    finally:
        _keepers.give_back(kept)
    limits = f"{CPU_S} s of processor, {WALL_S:g} s in all, {MEMORY_BYTES >> 20} MiB, no processes, no written files"
    weak = "" if "seccomp" in force else "; native code can pass the audit hook: pip install pyseccomp, with libseccomp"
    return f"sandbox: {', '.join(force)}; {limits}{weak}"


def _run(
    asked: dict, tests: dict | None, num_calls: int, cpu_s: int = CPU_S, wall_s: float = WALL_S
) -> tuple[Ran, list[str]]:
    """What the program did, and what was in force while it did it. With tests only their side is given the word."""
    word = secrets.token_hex(16)
    limits = {"cpu_s": cpu_s, "memory_bytes": MEMORY_BYTES}
    parts = [asked | limits | {"word": word}] if tests is None else [asked | limits, tests | limits | {"word": word}]
    end, output = _keepers.ask([json.dumps(part).encode() for part in parts], wall_s)
    if end == b"t":
        return Ran(-1, (), f"ran past {wall_s:g} s"), []
    if end == b"o":
        return Ran(-1, (), f"returned over {OUTPUT_BYTES} bytes"), []
    return _parsed(output, word, num_calls)


def _parsed(output: bytes, word: str, num_calls: int) -> tuple[Ran, list[str]]:
    _, found, text = output.rpartition(word.encode())
    try:
        program, failure, calls, force = json.loads(text) if found else (-1, "ended before its result", [], [])
        calls = tuple(Call(bool(returned), value) for returned, value in calls)
    except (ValueError, TypeError, RecursionError):
        return Ran(-1, (), "returned what JSON cannot hold"), []
    if not failure and len(calls) != num_calls:
        failure = "returned what JSON cannot hold"
    return Ran(program, () if failure else calls, failure), force


@functools.cache
def call_filter() -> bytes:
    """The filter of system calls in the kernel's form; empty where libseccomp or its binding is missing.

    Everything but ALLOWED_CALLS fails with EPERM, so that a program meets PermissionError, not a signal.
    """
    if sys.platform != "linux":
        return b""
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError):  # no binding, or no library behind it
        return b""
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
    for name in ALLOWED_CALLS:
        try:
            rules.add_rule(pyseccomp.ALLOW, name)
        except (OSError, ValueError):
            pass  # not a call of this processor
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


class _Keeper:
    """One keeper process, for one program at a time."""

    def __init__(self, program: bytes):
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", _KEEPER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={},
            start_new_session=True,
        )
        self._send([program], 0.0)
        self.network = self._receive(START_S).decode()

    def ask(self, parts: list[bytes], wall_s: float) -> tuple[bytes, bytes]:
        """(how the children ended, what they wrote) for a request and perhaps its tests. Raises OSError when the keeper
        is gone."""
        self._send(parts, wall_s)
        answer = self._receive(wall_s + GRACE_S)
        return answer[:1], answer[1:]

    def _send(self, parts: list[bytes], wall_s: float) -> None:
        request, tests = [*parts, b""][:2]
        self.process.stdin.write(HEAD.pack(len(request), len(tests), wall_s) + request + tests)
        self.process.stdin.flush()

    def _receive(self, seconds: float) -> bytes:
        deadline = time.monotonic() + seconds
        length, _, _ = HEAD.unpack(self._take(HEAD.size, deadline))
        return self._take(length, deadline)

    def _take(self, size: int, deadline: float) -> bytes:
        data = b""
        while len(data) < size:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise TimeoutError("the sandbox's keeper does not answer")
            more = os.read(self.process.stdout.fileno(), size - len(data))
            if not more:
                raise ConnectionResetError("the sandbox's keeper is gone")
            data += more
        return data

    def stop(self) -> None:
        self.process.kill()  # its child goes with it: the kernel was asked for that
        self.process.wait()
        self.process.stdout.close()
        try:
            self.process.stdin.close()
        except OSError:
            pass  # unwritten bytes for a process that is gone


class _Keepers:
    """Idle keepers of this process; one is started when none is idle, and kept."""

    def __init__(self):
        self._idle: list[_Keeper] = []
        self._lock = threading.Lock()
        self._owner = os.getpid()

    def borrow(self) -> _Keeper:
        with self._lock:
            if self._owner != os.getpid():  # forked: the keepers are the other process's
                self._idle, self._owner = [], os.getpid()
            if self._idle:
                return self._idle.pop()
        return _Keeper(call_filter())

    def give_back(self, keeper: _Keeper) -> None:
        with self._lock:
            self._idle.append(keeper)

    def ask(self, parts: list[bytes], wall_s: float) -> tuple[bytes, bytes]:
        """Of an idle keeper; one that is gone, or whose child cannot be stopped, is replaced, and a new one asked."""
        keeper = self.borrow()
        try:
            answer = keeper.ask(parts, wall_s)
        except OSError:
            keeper.stop()
            keeper = _Keeper(call_filter())
            answer = keeper.ask(parts, wall_s)
        except BaseException:  # interrupted: its answer would be taken for the next program's
            keeper.stop()
            raise
        self.give_back(keeper)
        return answer

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        if self._owner == os.getpid():
            for keeper in idle:
                keeper.stop()


_keepers = _Keepers()
atexit.register(_keepers.close)
