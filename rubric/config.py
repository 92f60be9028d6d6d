"""The configuration of grading, and the refusal of what cannot be graded, before anything is started."""

import ast
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from rubric import checks, judge, sandbox
from rubric.judge import JudgeConfig
from rubric.schema import Rubric
from rubric.verify import CHEAP, GRADERS

_PROGRAMS = ("python_tests", "asserts", "code_tests")  # run model-written programs, for sandbox.WALL_S at most
_PACKAGES = {  # check -> (module, package)
    "orz": ("math_verify", "math-verify"),
    "gym": ("reasoning_gym", "reasoning-gym"),
    "schema": ("jsonschema", "jsonschema"),
    "tool_schema": ("jsonschema", "jsonschema"),
}


@dataclass(frozen=True)
class RubricConfig:
    reward: str  # graded: (grade - 1) / 3; pass: 1 when grade >= 3, else 0
    workers: int  # processes for graders that can hang; -1: one a processor; 0: none, only environments that need none
    timeout_s: float  # seconds one row may take in a worker; past it the row is invalid and the worker replaced
    judge: JudgeConfig | None = None  # asked by rubrics with a judge; None where none has one


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check(
    environments: Sequence[str | None],
    config: RubricConfig,
    rubrics: Sequence[Rubric | None] | None = None,
    asked: object = None,
) -> None:
    """Raises ValueError, in one line that names key, value and remedy, for what RubricEvaluator cannot work with.

    asked: the judge that the caller brings, if any.
    """
    rubrics = rubrics if rubrics is not None else [None] * len(environments)
    if len(rubrics) != len(environments):
        raise ValueError(f"{len(environments)} environments and {len(rubrics)} rubrics: one of each a domain")
    if config.reward not in ("graded", "pass"):
        raise ValueError(f"rubric.reward {config.reward!r} is unknown: use graded or pass")
    if config.workers < -1:
        raise ValueError(f"rubric.workers {config.workers} is negative: use 1 or more, or -1 for one a processor")
    if not 0 < config.timeout_s < float("inf"):
        raise ValueError(f"rubric.timeout_s {config.timeout_s} is no positive number of seconds: use 6, for instance")
    for index, (environment, rubric) in enumerate(zip(environments, rubrics)):
        if environment is not None:
            _check_grader(environment, f"domains[{index}].environment")
        used = [] if environment is None else [(environment, f"environment {environment!r}")]
        if rubric is not None:
            used = _of_rubric(rubric, environment, f"domains[{index}].rubric")
        for name, what in used:
            _check_limits(name, what, config)
        if rubric is not None and rubric.judged and asked is None:
            if config.judge is None:
                raise ValueError(
                    f"domains[{index}].rubric {rubric.name!r} asks a judge: set rubric=judge and rubric.judge.model=..."
                )
            judge.check(config.judge)


def _of_rubric(rubric: Rubric, environment: str | None, key: str) -> list[tuple[str, str]]:
    """(name, what it is in a message) of the graders and checks of a rubric."""
    used = []
    for criterion in rubric.criteria:
        name, place = criterion.check.name, f"criteria.{criterion.name}.check"
        if name == "environment" and environment is None:
            continue
        if name == "environment":
            name = environment
        elif name.endswith(".py") or name in GRADERS:
            _check_grader(name, f"{key} {rubric.name!r}: {place}")
        _check_package(name, f"{key} {rubric.name!r}: {place}")
        used.append((name, f"{key} {rubric.name!r}: check {name!r}"))
    return used


def _check_limits(name: str, what: str, config: RubricConfig) -> None:
    heavy = name not in CHEAP if checks.plain(name) else checks.heavy(name)
    if heavy and config.workers == 0:
        raise ValueError(
            f"rubric.workers 0: {what} can hang and needs a process that can be stopped; "
            "use 1 or more, or -1 for one a processor"
        )
    if name in _PROGRAMS and config.timeout_s <= sandbox.WALL_S:
        raise ValueError(
            f"rubric.timeout_s {config.timeout_s:g} is no longer than the {sandbox.WALL_S:g} s a program of "
            f"{name!r} may run: use {1.5 * sandbox.WALL_S:g} or more"
        )


def _check_package(name: str, key: str) -> None:
    if name in _PACKAGES and importlib.util.find_spec(_PACKAGES[name][0]) is None:
        package = _PACKAGES[name][1]
        raise ValueError(f"{key} {name!r} needs the package {package}: pip install {package}")


def _check_grader(environment: str, key: str) -> None:
    if environment.endswith(".py"):
        path = Path(environment)
        if not path.is_file():
            raise ValueError(f"{key} {environment!r}: there is no such file in {os.getcwd()}, nor is it a path")
        if not _defines_grade(path, key):
            raise ValueError(f"{key} {environment!r} defines no `grade`: add `def grade(reply, answer, meta) -> float`")
    elif environment not in GRADERS:
        near = get_close_matches(environment, GRADERS, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        known = ", ".join(GRADERS)
        raise ValueError(f"{key} {environment!r} is unknown: {hint}use one of {known}, or the path of a .py file")
    else:
        _check_package(environment, key)


def _defines_grade(path: Path, key: str) -> bool:
    """Whether the module binds the name `grade` at its top level; it is read, not run."""
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError) as error:
        place = f"{path}:{getattr(error, 'lineno', 0) or 0}"
        raise ValueError(f"{key} {path} is not valid Python: {getattr(error, 'msg', error)} at {place}") from error
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == "grade":
            return True
        if isinstance(node, ast.Import | ast.ImportFrom) and any("grade" in (a.asname, a.name) for a in node.names):
            return True
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "grade" for target in node.targets):
            return True
    return False
