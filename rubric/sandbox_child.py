"""The far side of rubric/sandbox.py: a keeper process that forks a closed child for each program.

Run as a script by a fresh interpreter; stands on the standard library and its two neighbours, and is never imported.
The keeper runs no code but its own and the standard library's. It reads requests on stdin and writes answers on stdout,
a length before each; between the two it forks a child, reads what the child reports, and kills it when it is done, at
the limit of time, or when it says too much.

A child takes its own rights away before the program's first statement (sandbox_rights.py): first the limits of
resources, then it imports the modules of the standard library that the program names (nothing can be opened later),
then it becomes a user of its own (as root) and closes itself off.
"""

import ast
import gc
import importlib
import json
import os
import select
import signal
import struct
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
HEAD = struct.Struct(">IId")  # bytes of the request, bytes of its tests behind it, seconds that a program may take
OUTPUT_BYTES = 1 << 20
PRELOADED = (
    "abc array base64 binascii bisect calendar cmath collections collections.abc contextlib copy dataclasses datetime "
    "decimal enum fractions functools hashlib heapq inspect io itertools json math numbers operator pprint queue "
    "random re statistics string textwrap threading time traceback types typing unicodedata warnings _strptime "
    "encodings.ascii encodings.latin_1 encodings.utf_16 encodings.cp1252 encodings.unicode_escape"
).split()  # what programs use most, and what the standard library itself imports only when it is needed
NOT_IMPORTED = {"antigravity", "this", "idlelib", "turtle", "turtledemo", "tkinter", "test", "lib2to3", "__main__"}


sys.path.insert(0, HERE)
rights, tests = map(importlib.import_module, ("sandbox_rights", "sandbox_tests"))
sys.path.remove(HERE)


def read_source(programs: list[str]) -> tuple[int, object]:
    """(index, code) of the first program that compiles, after importing what it names; (-1, None)."""
    for index, source in enumerate(programs):
        try:
            tree = ast.parse(source, "<reply>")
            code = compile(tree, "<reply>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError):
            continue
        import_named(tree)
        return index, code
    return -1, None


def import_named(tree: ast.AST) -> None:
    """The standard library's modules that a program imports anywhere; what else it names will not be found."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            top = name.partition(".")[0]
            if top in sys.stdlib_module_names and top not in NOT_IMPORTED and name not in sys.modules:
                try:
                    importlib.import_module(name)
                except BaseException:
                    pass  # the program will meet it itself


def report(request: dict, code: object) -> tuple[str, list]:
    """(failure or "", [JSON of [returned, value or exception name], ...])"""
    dumps = json.dumps
    if code is None:
        return "no program compiles", []
    names = {"__name__": "program", "__builtins__": __builtins__}
    try:
        exec(code, names)
    except BaseException as error:
        return type(error).__name__, []
    function = names.get(request["entry"])
    if not callable(function):
        return f"defines no function {request['entry']}", []
    calls = []
    for args in request["calls"]:
        try:
            calls.append(dumps([True, function(*args)]))
        except BaseException as error:
            calls.append(dumps([False, type(error).__name__]))
    return "", calls


def program_alone(payload: bytes, seconds: float, program: bytes) -> None:
    """A child that runs a program, calls its function and reports; never returns."""
    dumps, write, leave = json.dumps, os.write, os._exit  # bound before the program can replace them
    request = json.loads(payload)
    rights.limit_resources(request["cpu_s"], request["memory_bytes"], seconds + 1.0)
    index, code = read_source(request["programs"])
    force = rights.close_off(program)
    failure, calls = report(request, code)
    text = (request["word"] + f"[{index}, {dumps(failure)}, [{', '.join(calls)}], {dumps(force)}]").encode()
    while text:
        text = text[write(3, text) :]
    leave(0)


def forked(work, *arguments, descriptors: list[int], nowhere: int) -> int:
    """The number of a child that does `work`, with these descriptors as 3, 4, ... and no others but to nowhere."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        for place, descriptor in enumerate(descriptors):
            os.dup2(descriptor, 100 + place)
        for place in range(3):
            os.dup2(nowhere, place)
        for place in range(len(descriptors)):
            os.dup2(100 + place, 3 + place)
        os.closerange(3 + len(descriptors), 128)
        work(*arguments)
    finally:
        os._exit(1)


def started(payload: bytes, tests_size: int, seconds: float, program: bytes, report: int, nowhere: int) -> list[int]:
    """The children of a request. With tests there are two, and that with the program is forked before the tests and
    what they expect have arrived here."""
    if not tests_size:
        return [forked(program_alone, payload, seconds, program, descriptors=[report], nowhere=nowhere)]
    (asked, ask), (answers, answer) = os.pipe(), os.pipe()
    serving = (tests.serve, payload, seconds, program, read_source)
    testing = (tests.report, seconds, program, read_source)
    children = [forked(*serving, descriptors=[asked, answer], nowhere=nowhere)]
    os.close(asked)
    os.close(answer)
    children.append(forked(*testing, take(tests_size), descriptors=[report, ask, answers], nowhere=nowhere))
    os.close(ask)
    os.close(answers)
    return children


def supervise(payload: bytes, tests_size: int, seconds: float, program: bytes, nowhere: int) -> bytes:
    """What the children reported, behind one letter: e they ended, t they ran past their time, o they said too much."""
    ours, theirs = os.pipe()
    children = started(payload, tests_size, seconds, program, theirs, nowhere)
    os.close(theirs)
    deadline, chunks, size, end = time.monotonic() + seconds, [], 0, b"e"
    while size <= OUTPUT_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([ours], [], [], left)[0]:
            end = b"t"
            break
        chunk = os.read(ours, 1 << 16)
        if not chunk:
            break
        chunks.append(chunk)
        size += len(chunk)
    os.close(ours)
    for pid in children:
        for kill in (os.killpg, os.kill):  # not reaped yet, so the number is still the child's
            try:
                kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        os.waitpid(pid, 0)
    return (b"o" if size > OUTPUT_BYTES else end) + b"".join(chunks)[: OUTPUT_BYTES + 1]


def take(size: int) -> bytes:
    """`size` bytes of stdin; leaves when it ends: the trainer is gone."""
    data = b""
    while len(data) < size:
        more = os.read(0, size - len(data))
        if not more:
            os._exit(0)
        data += more
    return data


def main() -> None:
    """The keeper. The first request is the filter of system calls; its answer names what the keeper itself has put in
    force."""
    for name in PRELOADED:
        importlib.import_module(name)
    time.localtime()  # reads the time zone, which a child cannot
    try:
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")  # the first to go when memory ends, and its children with it
    except OSError:
        pass  # not Linux
    nowhere = os.open(os.devnull, os.O_RDWR)
    program = take(HEAD.unpack(take(HEAD.size))[0])
    answer = b"no network" if rights.leave_network(bool(program)) else b""
    gc.collect()
    gc.freeze()  # so that a child's collection does not copy the keeper's pages
    while True:
        answer = HEAD.pack(len(answer), 0, 0.0) + answer
        while answer:
            answer = answer[os.write(1, answer) :]
        size, tests_size, seconds = HEAD.unpack(take(HEAD.size))
        answer = supervise(take(size), tests_size, seconds, program, nowhere)


if __name__ == "__main__":
    main()
