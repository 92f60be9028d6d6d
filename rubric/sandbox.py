"""One model-written program in one child process: a fresh interpreter that is killed when it passes a limit.

The child is `sys.executable -I -S -B`, and gets: no inherited environment variable, no
inherited file descriptor, an empty temporary folder to work in (removed afterwards), and from
rubric/sandbox_child.py, before the program is compiled, limits on processor time, address space, written files (0
bytes), processes and threads (none), open files and core dumps. Started as root on Linux it also becomes a user of
its own that owns nothing. Whatever the child has started in its process group is killed with it, at `wall_s` at the
latest.

The program's own output goes nowhere. Return values come back as JSON on a pipe behind a random word, at most 1 MiB;
what they should be is never sent to the child, so a forged result is worth no more than a guess.

What this does not protect from: reading files that the child's user may read, opening sockets, and, when the trainer
is not root, signals to other processes of the same user and deletion of its files. Root outside Linux, or in a
container that forbids changing the user, keeps its user and has no limit on processes. That needs seccomp or
namespaces. Only the standard library can be imported. POSIX only; tried on Linux.
"""

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

CPU_S = 2  # seconds of processor time, whole ones: a graded function needs milliseconds
WALL_S = 4.0  # seconds; over CPU_S so that a busy machine does not fail a right program
MEMORY_BYTES = 512 << 20  # of address space
OUTPUT_BYTES = 1 << 20
_CHILD = str(Path(__file__).with_name("sandbox_child.py"))


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

    Never raises for what a program does. Raises OSError when no process can be started.
    """
    word = secrets.token_hex(16)
    request = {
        "programs": list(programs),
        "entry": entry,
        "calls": [list(args) for args in calls],
        "word": word,
        "cpu_s": cpu_s,
        "memory_bytes": MEMORY_BYTES,
        "alarm_s": wall_s + 1.0,
    }
    with tempfile.TemporaryDirectory(prefix="rubric-", ignore_cleanup_errors=True) as folder:
        with tempfile.TemporaryFile() as stdin:
            stdin.write(json.dumps(request).encode())
            stdin.seek(0)
            output, reason = _output_of(stdin, folder, wall_s)
    return _parsed(output, word, len(calls), reason)


def _output_of(stdin, folder: str, wall_s: float) -> tuple[bytes, str]:
    """What the child wrote to its pipe, and how it ended."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", _CHILD],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={},
        start_new_session=True,
    )
    deadline, chunks, size, reason = time.monotonic() + wall_s, [], 0, ""
    try:
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([child.stdout], [], [], left)[0]:
                reason = f"ran past {wall_s:g} s"
                break
            chunk = os.read(child.stdout.fileno(), 1 << 16)
            if not chunk:
                break
            chunks.append(chunk)
            size += len(chunk)
            if size > OUTPUT_BYTES:
                reason = f"returned over {OUTPUT_BYTES} bytes"
                break
    finally:
        try:
            os.killpg(child.pid, signal.SIGKILL)  # not reaped yet, so the number is still the child's
        except (ProcessLookupError, PermissionError):
            child.kill()
        child.stdout.close()
        child.wait()
    return b"".join(chunks), reason


def _parsed(output: bytes, word: str, num_calls: int, reason: str) -> Ran:
    if reason:
        return Ran(-1, (), reason)
    _, found, text = output.rpartition(word.encode())
    try:
        program, failure, calls = json.loads(text) if found else (-1, "ended before its result", [])
        calls = tuple(Call(bool(returned), value) for returned, value in calls)
    except (ValueError, TypeError, RecursionError):
        return Ran(-1, (), "returned what JSON cannot hold")
    if not failure and len(calls) != num_calls:
        failure = "returned what JSON cannot hold"
    return Ran(program, () if failure else calls, failure)
