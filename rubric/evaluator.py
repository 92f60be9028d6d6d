"""RubricEvaluator: one grade, one reward and one validity flag for every row of a batch.

Grade, reward and validity are three things. The grade (1 to 4, pass is >= 3) steers the curriculum, the reward the
gradient: (grade - 1) / 3 when `graded`, 1 for a pass else 0 when `pass`. A row is valid when its grader answered; one
that raised or hung says nothing about the policy, so its row is not a zero but no row, and the reason is counted in
`failures`.

An environment is a name from rubric/verify.py or the path of a Python file with

    def grade(reply: str, answer, meta: dict) -> float   # 1 to 4

Graders that cannot hang run here; the others in worker processes (rubric/pool.py), which never import JAX.
"""

import ast
import importlib.util
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rubric import sandbox
from rubric.pool import Result, Task, WorkerPool, graded
from rubric.verify import CHEAP, GRADERS

PASS_GRADE = 3.0
_MANY_REASONS = 200  # different ones; messages that quote the reply would otherwise fill the memory of a long run


@dataclass(frozen=True)
class RubricConfig:
    reward: str  # graded: (grade - 1) / 3; pass: 1 when grade >= 3, else 0
    workers: int  # processes for graders that can hang; -1: one a processor; 0: none, only environments that need none
    timeout_s: float  # seconds one row may take in a worker; past it the row is invalid and the worker replaced


class Grades(NamedTuple):
    grade_B: np.ndarray  # f32 in [1, 4]; 1 where invalid
    reward_B: np.ndarray  # f32 in [0, 1]; 0 where invalid
    valid_B: np.ndarray  # bool, the grader answered


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


def _check_environment(environment: str, key: str) -> None:
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
    elif environment == "orz" and importlib.util.find_spec("math_verify") is None:
        raise ValueError(f"{key} 'orz' needs the package math-verify: pip install math-verify")


def check(environments: Sequence[str], config: RubricConfig) -> None:
    """Raises ValueError, in one line that names key, value and remedy, for what RubricEvaluator cannot work with."""
    for index, environment in enumerate(environments):
        _check_environment(environment, f"domains[{index}].environment")
    if config.reward not in ("graded", "pass"):
        raise ValueError(f"rubric.reward {config.reward!r} is unknown: use graded or pass")
    if config.workers < -1:
        raise ValueError(f"rubric.workers {config.workers} is negative: use 1 or more, or -1 for one a processor")
    if not 0 < config.timeout_s < float("inf"):
        raise ValueError(f"rubric.timeout_s {config.timeout_s} is no positive number of seconds: use 6, for instance")
    heavy = [environment for environment in environments if environment not in CHEAP]
    if heavy and config.workers == 0:
        raise ValueError(
            f"rubric.workers 0: environment {heavy[0]!r} can hang and needs a process that can be stopped; "
            "use 1 or more, or -1 for one a processor"
        )
    if "python_tests" in heavy and config.timeout_s <= sandbox.WALL_S:
        raise ValueError(
            f"rubric.timeout_s {config.timeout_s:g} is no longer than the {sandbox.WALL_S:g} s a program of "
            f"'python_tests' may run: use {1.5 * sandbox.WALL_S:g} or more"
        )


class RubricEvaluator:
    """Grades replies by the environment of their domain; `environments` has one entry a domain, in the domains' order.

    Raises ValueError as `check`. Close it, or use it as a context manager: it may own processes. Calls must not
    overlap.
    """

    def __init__(self, environments: Sequence[str], config: RubricConfig):
        check(environments, config)
        self._environments = [os.path.abspath(name) if name.endswith(".py") else name for name in environments]
        self._config = config
        self.failures: Counter[tuple[int, str]] = Counter()  # (domain, reason) -> invalid rows so far
        heavy = sorted({name for name in self._environments if name not in CHEAP})
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = processors if config.workers == -1 else config.workers
        self._pool = WorkerPool(heavy, workers, config.timeout_s) if heavy else None

    def grade(self, domain_B: np.ndarray, rows: Sequence[Mapping], replies: Sequence[str]) -> Grades:
        """Grades of B replies.

        domain_B: i32 (B,), indices into `environments`; rows: data rows with `answer` and perhaps `meta`; replies: B
        texts. Never raises for what a grader does, and always returns (see rubric/pool.py for how long that may take).
        """
        if not len(domain_B) == len(rows) == len(replies):
            raise ValueError(
                f"{len(domain_B)} domains, {len(rows)} rows and {len(replies)} replies: one of each a sequence"
            )
        tasks = [
            Task(self._environments[domain], reply, row.get("answer"), row.get("meta") or {})
            for domain, row, reply in zip(np.asarray(domain_B).tolist(), rows, replies)
        ]
        results: list[Result | None] = [
            graded(GRADERS[t.environment], t) if t.environment in CHEAP else None for t in tasks
        ]
        slow = [index for index, result in enumerate(results) if result is None]
        if slow:
            for index, result in zip(slow, self._pool.run([tasks[index] for index in slow])):
                results[index] = result
        for domain, result in zip(np.asarray(domain_B).tolist(), results):
            if result.grade is None:
                self._count(domain, result.reason)
        return self._grades(results)

    def _count(self, domain: int, reason: str) -> None:
        known = (domain, reason) in self.failures or len(self.failures) < _MANY_REASONS
        self.failures[(domain, reason if known else "other reasons")] += 1

    def _grades(self, results: Sequence[Result]) -> Grades:
        valid_B = np.array([result.grade is not None for result in results], bool)
        grade_B = np.array([1.0 if result.grade is None else result.grade for result in results], np.float32)
        reward_B = (grade_B - 1.0) / 3.0 if self._config.reward == "graded" else grade_B >= PASS_GRADE
        return Grades(grade_B, np.where(valid_B, reward_B, 0.0).astype(np.float32), valid_B)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> "RubricEvaluator":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
