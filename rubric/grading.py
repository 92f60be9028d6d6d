"""One row graded, and a worker's life around it: load the graders, answer rows until the socket ends (rubric/pool.py).

A grader's answer is a grade, or the reason why there is none: it raised, or answered off the scale. A user's file is
executed here and nowhere else.
"""

import importlib.util
import json
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rubric import checks
from rubric.checks import Checked
from rubric.verify import GRADERS

OF_REWARD = "for a reward from 0 to 1 return 1 + 3 * reward, or write `def reward_fn(messages, answer)` instead"


class Task(NamedTuple):
    environment: str  # a key of GRADERS, the path of a Python file, or the key of a rubric's check
    reply: str
    answer: object
    meta: dict


class Result(NamedTuple):
    grade: float | None  # in [1, 4]; None when there is a reason
    reason: str  # "" for a grade


def reason_of(error: BaseException) -> str:
    """The exception in one line of at most 160 characters, its type first."""
    text = " ".join(str(error).split())
    return (f"{type(error).__name__}: {text}" if text else type(error).__name__)[:160]


def load(environment: str) -> Callable[[str, object, dict], float]:
    """The grader of an environment; a path ending in .py is executed as a module, and its `grade` is taken."""
    if environment.startswith(checks.PREFIX):
        return checks.load(environment)
    if not environment.endswith(".py"):
        return GRADERS[environment]
    spec = importlib.util.spec_from_file_location(environment, environment)
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(Path(environment).parent))  # last: what lies beside the file shadows nothing
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if not callable(module.grade):
        raise TypeError("`grade` is no function")
    return module.grade


def graded(grader: Callable[[str, object, dict], float], task: Task) -> Result:
    """The grader's answer, or what it raised."""
    try:
        given = grader(task.reply, task.answer, task.meta)
        if type(given).__name__ in ("bool", "bool_"):  # numpy's too, which workers need not import
            return Result(None, f"the grader returned {given}, and grades are 1 to 4: {OF_REWARD}")
        grade = float(given)
        if not 1.0 <= grade <= 4.0:
            return Result(None, f"grade {grade:g} is outside the scale 1 to 4: {OF_REWARD}")
        return Result(grade, "")
    except (Exception, SystemExit) as error:
        return Result(None, reason_of(error))


def checked(check: Callable[[str, object, dict], checks.Found], task: Task) -> Checked:
    """The same for a rubric's check, with a score in [0, 1] and measures."""
    try:
        score, measures = check(task.reply, task.answer, task.meta)
        if not 0.0 <= score <= 1.0:
            return Checked(None, f"score {score:g} is outside the scale 0 to 1", {})
        return Checked(float(score), "", measures)
    except (Exception, SystemExit) as error:
        return Checked(None, reason_of(error), {})


def answered(grader: Callable, task: Task) -> Result | Checked:
    return (checked if task.environment.startswith(checks.PREFIX) else graded)(grader, task)


def _place(error: BaseException, path: str) -> str:
    """The last line of a user's file that the error went through, as file:line and a colon."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f"{path}:{lines[-1]}: " if lines else f"{path}: "


def _answer(row: bytes, graders: dict[str, Callable], broken: dict[str, Result]) -> Result | Checked:
    try:
        task = Task(*pickle.loads(row))
    except Exception as error:  # a class that this process cannot import
        return Result(None, reason_of(error))
    return broken.get(task.environment) or answered(graders[task.environment], task)


def serve(descriptor: int, environments: list[str]) -> None:
    """The worker's life: load the graders, say which cannot be, answer chunks until the socket ends."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        pass  # not Linux
    channel = socket.socket(fileno=descriptor)
    graders, broken, places = {}, {}, {}
    for environment in environments:
        try:
            graders[environment] = load(environment)
            if environment == "orz":
                graders[environment]("1", "1", {})  # imports and compiles what every row needs
        except (Exception, SystemExit) as error:
            graders.pop(environment, None)
            broken[environment] = Result(None, reason_of(error))
            places[environment] = _place(error, environment) + reason_of(error)
    chunks = channel.makefile("rb")
    channel.sendall(json.dumps(places).encode() + b"\n")  # ready
    while True:
        try:
            rows = pickle.load(chunks)
        except EOFError:
            return
        for row in rows:
            channel.sendall(json.dumps(_answer(row, graders, broken)).encode() + b"\n")
