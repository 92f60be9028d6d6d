"""The child's side of rubric/sandbox.py: takes its own rights away, runs one program, reports what its calls returned.

Run as a script by a fresh interpreter; imports nothing but the standard library and is never imported itself.
Request on stdin and report on stdout are JSON; the report stands behind the request's random word.
"""

import json
import os
import resource
import signal
import sys


def limit(kind: int, value: int) -> None:
    """Soft and hard, and never above a hard limit that is there already."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def become_nobody() -> None:
    """As root on Linux: a user that no other process has, so that its limit of processes holds and it owns no file.

    The standard library may lie under a folder that only root may enter: it stays importable through a descriptor.
    """
    folder = os.path.dirname(os.__file__)
    library = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    for user in ((1 << 30) + os.getpid(), 65534):  # 65534 is nobody, where user numbers are mapped to a small range
        try:
            os.chown(".", user, user)
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        except OSError:
            continue
        for paths in (sys.path, *(module.__path__ for module in sys.modules.values() if hasattr(module, "__path__"))):
            paths[:] = [path.replace(folder, f"/proc/self/fd/{library}", 1) for path in paths]
        return
    os.close(library)


def restrict(cpu_s: int, memory_bytes: int, alarm_s: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, alarm_s)  # ends the child when whoever watches it was killed
    limit(resource.RLIMIT_CPU, cpu_s)
    limit(resource.RLIMIT_AS, memory_bytes)
    limit(resource.RLIMIT_FSIZE, 0)  # pipes are not files
    limit(resource.RLIMIT_NOFILE, 32)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_NPROC, 0)
    if sys.platform == "linux" and os.geteuid() == 0:
        become_nobody()


def compiled(programs: list[str]) -> tuple[int, object]:
    for index, program in enumerate(programs):
        try:
            return index, compile(program, "<reply>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError):
            continue
    return -1, None


def report(request: dict) -> tuple[int, str, list]:
    """(index of the program, failure or "", [JSON of [returned, value or exception name], ...])"""
    dumps = json.dumps
    index, code = compiled(request["programs"])
    if code is None:
        return index, "no program compiles", []
    names = {"__name__": "program", "__builtins__": __builtins__}
    try:
        exec(code, names)
    except BaseException as error:
        return index, type(error).__name__, []
    function = names.get(request["entry"])
    if not callable(function):
        return index, f"defines no function {request['entry']}", []
    calls = []
    for args in request["calls"]:
        try:
            calls.append(dumps([True, function(*args)]))
        except BaseException as error:
            calls.append(dumps([False, type(error).__name__]))
    return index, "", calls


def main() -> None:
    request = json.load(sys.stdin)
    pipe = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    restrict(request["cpu_s"], request["memory_bytes"], request["alarm_s"])
    dumps, write, leave = json.dumps, os.write, os._exit  # bound before the program can replace them
    index, failure, calls = report(request)
    text = (request["word"] + f"[{index}, {dumps(failure)}, [{', '.join(calls)}]]").encode()
    while text:
        text = text[write(pipe, text) :]
    leave(0)


if __name__ == "__main__":
    main()
