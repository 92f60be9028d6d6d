"""The environment protocol: what answers a policy between its turns, and grades the conversation when it is over.

    interact(messages) -> list of messages    the environment's next turns; empty: the conversation is over
    grade(messages, answer) -> float          1 to 4, a pass is >= 3

`messages` are the row's own, the policy's turns (role assistant) and the environment's, in order; the last is the
policy's. Neither method may change them, and both may be called from several threads at once.

An environment may have more: `of_row(row) -> Environment`, where it depends on more of a data row than its answer;
`tools`, the JSON schemas that the prompt shows; `stops`, texts that end the policy's turn once it has written one;
`interact_all(conversations)`, where many are cheaper at once than one by one, with one entry each, its turns or an
Unavailable; `close()`. `interact` and `grade` raise Unavailable when something they need is down: that says nothing
about the policy, so the row is invalid, not zero.

A module is an environment, too: a .py file with functions of these names. The other form, known from RL2, has
`reward_fn(messages, answer) -> float` from 0 to 1 in the place of `grade`; `interact` may be missing there. A file with
`grade(reply, answer, meta)` and no `interact` is no environment but a grader of single replies (rubric/evaluator.py).
"""

import ast
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

Message = dict[str, str]  # {"role", "content"}
ROLES = ("system", "user", "tool")  # of an environment's turns


@runtime_checkable
class Environment(Protocol):
    def interact(self, messages: Sequence[Message]) -> list[Message]: ...

    def grade(self, messages: Sequence[Message], answer: object) -> float: ...


class Unavailable(Exception):
    """What the environment depends on does not answer; its text is the reason, in one line."""


def of_row(environment: Environment, row: Mapping) -> Environment:
    """The environment of one data row."""
    bind = getattr(environment, "of_row", None)
    return environment if bind is None else bind(row)


def shown_tools(environment: Environment, row: Mapping) -> list[dict] | None:
    """JSON schemas for the `tools` argument of the row's chat template; None where there are none."""
    return [*(getattr(of_row(environment, row), "tools", None) or ())] or None


def checked_turns(turns: object) -> list[Message]:
    """What `interact` returned. Raises ValueError, one line, when it is no list of turns that a template can render."""
    if not isinstance(turns, list | tuple):
        raise ValueError(f"interact returned {_short(turns)}: return a list of {{role, content}}, empty at the end")
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise ValueError(f"interact returned the turn {_short(turn)}: role is one of {', '.join(ROLES)}, with text")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def checked_grade(grade: object) -> float:
    """Raises ValueError when it is no number from 1 to 4."""
    if isinstance(grade, bool) or not isinstance(grade, int | float) or not 1 <= grade <= 4:
        raise ValueError(f"grade returned {_short(grade)}: return a number from 1 to 4, or name it reward_fn: 0 to 1")
    return float(grade)


def grade_of_reward(reward: object) -> float:
    """1 + 3 x reward for a reward in [0, 1], True and False included; raises ValueError else."""
    try:
        value = float(reward)
    except (TypeError, ValueError):
        value = -1.0
    if not 0 <= value <= 1:
        raise ValueError(f"reward_fn returned {_short(reward)}: return a number from 0 to 1")
    return 1.0 + 3.0 * value


def is_environment(path: str | Path, key: str = "environment") -> bool:
    """Whether a .py file is an environment; False: a grader of single replies. The file is read, not run.

    Raises FileNotFoundError or ValueError, one line that begins with `key`, when it is neither.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{key} {str(path)!r}: there is no such file; give the path of a .py file")
    try:
        body = ast.parse(path.read_bytes(), filename=str(path)).body
    except (SyntaxError, ValueError) as error:
        place = f"{path}:{getattr(error, 'lineno', 0) or 0}"
        raise ValueError(f"{key} {path} is not valid Python: {getattr(error, 'msg', error)} at {place}") from error
    names = _bound(body)
    for name in ("interact", "grade", "reward_fn"):
        if isinstance(names.get(name), ast.AsyncFunctionDef):
            raise ValueError(f"{key} {path}:{names[name].lineno}: {name} is async: make it a plain function")
    if "grade" not in names and "reward_fn" not in names:
        raise ValueError(
            f"{key} {str(path)!r} defines no `grade`: add `def grade(messages, answer) -> float` from 1 to 4, or "
            "`def reward_fn(messages, answer) -> float` from 0 to 1"
        )
    takes = _parameters(names.get("grade"))
    if "interact" in names and takes == 3:
        raise ValueError(
            f"{key} {path}:{names['grade'].lineno}: grade takes (reply, answer, meta), but a file with `interact` "
            "grades conversations: make it `def grade(messages, answer) -> float`"
        )
    return "interact" in names or "grade" not in names or takes == 2


def module_functions(path: str | Path) -> tuple[Callable | None, Callable]:
    """(interact or None, grade on the scale of 1 to 4) of a user's file, which is executed."""
    spec = importlib.util.spec_from_file_location(f"environment_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(Path(path).parent))  # last: what lies beside the file shadows nothing
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    grade, reward_fn = getattr(module, "grade", None), getattr(module, "reward_fn", None)
    if grade is not None:
        return getattr(module, "interact", None), lambda messages, answer: checked_grade(grade(messages, answer))
    return getattr(module, "interact", None), lambda messages, answer: grade_of_reward(reward_fn(messages, answer))


def _bound(body: Sequence[ast.stmt]) -> dict[str, ast.stmt]:
    """Names bound at a module's top level, with the statement that does it."""
    names: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name: node for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    return names


def _parameters(node: ast.stmt | None) -> int | None:
    """Positional parameters without a default; None where the text does not tell."""
    if not isinstance(node, ast.FunctionDef) or node.args.vararg:
        return None
    return len(node.args.posonlyargs) + len(node.args.args) - len(node.args.defaults)


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
