"""Tests written as statements, run apart from the program that they test.

Two processes: one has the program, the other the tests, where the name of the function stands for a call to the first.
Arguments and results cross between them as plain values, so the program cannot replace what checks it, cannot see what
is expected, cannot return an object that claims to be equal to everything, and cannot write the report.

Plain values are None, truth values, numbers, texts, bytes, and lists, tuples, sets and dicts of them; an object of a
derived class (a Counter, a named tuple) arrives as the plain value it is made of. Left out: functions, iterators and
other objects as arguments or results, and arguments that the function is to change in place.

Imported by rubric/sandbox_child.py in a bare interpreter.
"""

import json
import os
from collections.abc import Callable

import sandbox_rights

MARKS = {list: "l", tuple: "t", set: "s", frozenset: "f"}
MAKES = {"l": list, "t": tuple, "s": set, "f": frozenset}


def plain(value: object) -> object:
    """A value as JSON that keeps its kind. Raises TypeError for what is no plain value."""
    if value is None or isinstance(value, bool):
        return value
    for kind, read in ((int, int.__int__), (float, float.__float__), (str, str.__str__)):
        if isinstance(value, kind):
            return read(value)
    if isinstance(value, complex):
        return ["c", value.real, value.imag]
    if isinstance(value, bytes):
        return ["b", bytes.hex(value)]
    if isinstance(value, dict):
        return ["d", *([plain(key), plain(item)] for key, item in dict.items(value))]
    for kind, mark in MARKS.items():
        if isinstance(value, kind):
            return [mark, *map(plain, kind.__iter__(value))]
    raise TypeError(f"{type(value).__name__} is no plain value")


def value_of(form: object) -> object:
    """The value that `plain` gave this form."""
    if not isinstance(form, list):
        return form
    mark, *items = form
    if mark == "c":
        return complex(*items)
    if mark == "b":
        return bytes.fromhex(*items)
    if mark == "d":
        return {value_of(key): value_of(item) for key, item in items}
    return MAKES[mark](map(value_of, items))


def send(descriptor: int, message: object) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]


class Lines:
    """What arrives on a pipe, message by message. Raises EOFError at its end."""

    def __init__(self, descriptor: int):
        self._descriptor, self._rest = descriptor, b""

    def next(self) -> object:
        while b"\n" not in self._rest:
            more = os.read(self._descriptor, 1 << 16)
            if not more:
                raise EOFError
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)


def report(seconds: float, program: bytes, read_source: Callable, payload: bytes) -> None:
    """The tests' side: runs them and reports. Descriptors: 3 the report, 4 calls to make, 5 their answers."""
    request = json.loads(payload)
    sandbox_rights.limit_resources(request["cpu_s"], request["memory_bytes"], seconds + 1.0)
    read_source(["\n".join([request["setup"], *request["tests"]])])  # for what they import
    force = sandbox_rights.close_off(program)
    answers = Lines(5)
    try:
        index, failure = answers.next()
    except (EOFError, ValueError, TypeError):
        index, failure = -1, "ended before its result"

    def function(*args, **kwargs):
        send(4, [plain(args), plain(kwargs)])
        returned, form = answers.next()
        if not returned:
            raise Raised(form)
        return value_of(form)

    results = [] if failure else tested(request, function)
    text = f"{request['word']}[{index}, {json.dumps(failure)}, [{', '.join(results)}], {json.dumps(force)}]".encode()
    while text:
        text = text[os.write(3, text) :]
    os._exit(0)


class Raised(Exception):
    """The function under test raised; the text is the type's name."""


def tested(request: dict, function: Callable) -> list[str]:
    names = {"__name__": "tests"}
    exec(compile(request["setup"], "<setup>", "exec"), names)
    names[request["entry"]] = function
    results = []
    for source in request["tests"]:
        try:
            exec(compile(source, "<test>", "exec"), names)
            results.append(json.dumps([True, None]))
        except BaseException as error:
            name = str(error) if isinstance(error, Raised) else type(error).__name__
            results.append(json.dumps([False, name]))
    return results


def serve(payload: bytes, seconds: float, program: bytes, read_source: Callable) -> None:
    """The program's side: runs it, says whether it defines the function, then answers calls until none comes.
    Descriptors: 3 calls, 4 their answers."""
    request = json.loads(payload)
    sandbox_rights.limit_resources(request["cpu_s"], request["memory_bytes"], seconds + 1.0)
    index, code = read_source(request["programs"])
    sandbox_rights.close_off(program)
    entry, names = request["entry"], {"__name__": "program", "__builtins__": __builtins__}
    failure = "no program compiles" if code is None else ""
    if code is not None:
        try:
            exec(code, names)
        except BaseException as error:
            failure = type(error).__name__
    if not failure and not callable(names.get(entry)):
        failure = f"defines no function {entry}"
    send(4, [index, failure])
    asked = Lines(3)
    while True:
        args, kwargs = map(value_of, asked.next())
        try:
            answer = [True, plain(names[entry](*args, **kwargs))]
        except BaseException as error:
            answer = [False, type(error).__name__]
        send(4, answer)
