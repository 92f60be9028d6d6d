"""Environments by name: what `environment` of a domain may be besides a grader of single replies.

calculator                               the calculator, answer graded by `number`
calculator,show=no                       the same; prompts do not list the tool, their examples show it
python                                   Python expressions in the sandbox, answer graded by `number`
tools                                    the tools that a row declares (`tools`), graded by `json_call`
tools,use=calculator+python,grade=eq     built-in tools, another grader
tools,file=tools.json                    tools declared in a file, a JSON list of schemas
searchr1,url=http://127.0.0.1:8000       search; topk=3, timeout_s=10 are the defaults
my_env.py                                a user's module (protocol.py)
"""

import json
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from rubric.environments import search
from rubric.environments.builtin_tools import BUILTIN
from rubric.environments.protocol import Environment, is_environment
from rubric.environments.tools import Tool, ToolEnvironment, declared
from rubric.environments.user_module import UserModule
from rubric.verify import GRADERS

GRADE_CHOICES = tuple(name for name in GRADERS if name != "orz")  # orz can hang and sets itself no limit
USER_PROCESSES = 4
USER_TIMEOUT_S = 30.0  # of one call of a user's module


def is_multi_turn(environment: str, key: str = "environment") -> bool:
    """Whether a domain's `environment` is one of these; False: a grader of single replies, or no name known here.

    Raises FileNotFoundError or ValueError, one line that begins with `key`, for a .py file that is neither.
    """
    if environment.endswith(".py"):
        return is_environment(environment, key)
    return environment.split(",")[0] in NAMES


def check(environment: str, key: str = "environment") -> None:
    """Raises ValueError or FileNotFoundError, one line that begins with `key`, for what `load` cannot make. Runs no
    code of a user and asks no service."""
    if not is_multi_turn(environment, key):
        known = [*NAMES, *GRADERS]
        near = get_close_matches(environment.split(",")[0], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"{key} {environment!r} is no environment of several turns: {hint}use one of {', '.join(NAMES)}"
        )
    if not environment.endswith(".py"):
        name, *parts = environment.split(",")
        NAMES[name](_options(parts, f"{key} {environment!r}"), f"{key} {environment!r}")


def load(environment: str, key: str = "environment", processes: int = USER_PROCESSES) -> Environment:
    """The environment of a name with options or of a path; raises as `check`, and when a user's file does not load."""
    check(environment, key)
    if environment.endswith(".py"):
        return UserModule(environment, processes, USER_TIMEOUT_S)
    name, *parts = environment.split(",")
    return NAMES[name](_options(parts, key), key)


def _options(parts: list[str], where: str) -> dict[str, str]:
    options = {}
    for part in parts:
        option, equals, value = part.strip().partition("=")
        if not equals or not value:
            raise ValueError(f"{where}: {part.strip()!r} is no option; write name,option=value")
        options[option] = value
    return options


def _take(options: dict[str, str], where: str, **defaults: str) -> list[str]:
    for option in options:
        if option not in defaults:
            near = ", ".join(defaults) or "none"
            raise ValueError(f"{where}: there is no option {option!r}; there is {near}")
    return [options.get(option, default) for option, default in defaults.items()]


def _tools(use: str, grade: str, file: str, show: str, where: str) -> ToolEnvironment:
    tools: list[Tool] = []
    if show not in ("yes", "no"):
        raise ValueError(f"{where}: show={show}; expected yes or no: whether prompts list the tools")
    for name in use.split("+") if use else ():
        if name not in BUILTIN:
            raise ValueError(f"{where}: no built-in tool is named {name!r}; use {' or '.join(BUILTIN)}")
        tools.append(BUILTIN[name])
    if grade not in GRADE_CHOICES:
        raise ValueError(f"{where}: grade={grade} cannot be used here; use one of {', '.join(GRADE_CHOICES)}")
    if file:
        try:
            schemas = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{where}: file={file} cannot be read: {' '.join(str(error).split())}") from error
        tools += declared(schemas, f"{where}: {file}")
    return ToolEnvironment(tools, grade, BUILTIN, shown=show == "yes")


def _calculator(options: dict[str, str], where: str) -> Environment:
    grade, show = _take(options, where, grade="number", show="yes")
    return _tools("calculator", grade, "", show, where)


def _python(options: dict[str, str], where: str) -> Environment:
    grade, show = _take(options, where, grade="number", show="yes")
    return _tools("python", grade, "", show, where)


def _declared_tools(options: dict[str, str], where: str) -> Environment:
    use, grade, file, show = _take(options, where, use="", grade="json_call", file="", show="yes")
    return _tools(use, grade, file, show, where)


def _searchr1(options: dict[str, str], where: str) -> Environment:
    url, topk, timeout_s = _take(options, where, url=search.URL, topk="3", timeout_s="10")
    try:
        return search.SearchR1(search.Client(url, float(timeout_s)), int(topk))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


NAMES: dict[str, Callable[[dict[str, str], str], Environment]] = {
    "calculator": _calculator,
    "python": _python,
    "tools": _declared_tools,
    "searchr1": _searchr1,
}
