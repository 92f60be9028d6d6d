"""RubricEvaluator: one grade, one reward and one validity flag for every row of a batch.

Grade, reward and validity are three things. The grade (1 to 4, pass is >= 3) steers the curriculum, the reward the
gradient: (grade - 1) / 3 when `graded`, 1 for a pass else 0 when `pass`. A row is valid when its grader answered; one
that raised or hung says nothing about the policy, so its row is not a zero but no row, and the reason is counted in
`failures`.

A domain is graded by its environment, or by a rubric (rubric/schema.py). An environment is a name from
rubric/verify.py or the path of a Python file with

    def grade(reply: str, answer, meta: dict) -> float   # 1 to 4

Graders and checks that cannot hang run here; the others in worker processes (rubric/pool.py), which never import JAX;
a judge is asked by threads meanwhile (rubric/judge.py).
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rubric import asking, checks, scoring, versions
from rubric.checks import Check, Checked
from rubric.config import RubricConfig, check, processors
from rubric.grading import Result, Task, answered, load
from rubric.judge import Judge
from rubric.pool import WorkerPool
from rubric.schema import Rubric, has
from rubric.scoring import Graded
from rubric.verify import CHEAP

PASS_GRADE = 3.0
FIXED = "fixed_grade"  # in a row's meta: the grade of every reply, so that nothing is rewarded; the KL term still acts
At = tuple[int, str | None]
_MANY_REASONS = 200  # different ones; messages that quote the reply would otherwise fill the memory of a long run

__all__ = ["PASS_GRADE", "Grades", "RubricConfig", "RubricEvaluator", "Scored", "check"]


class Grades(NamedTuple):
    grade_B: np.ndarray  # f32 in [1, 4]; 1 where invalid
    reward_B: np.ndarray  # f32 in [0, 1]; 0 where invalid
    valid_B: np.ndarray  # bool, the grader answered


class Scored(NamedTuple):
    """Grades, and how the rows of domains with a rubric came by them: lines that are joined and split like grades."""

    grades: Grades
    scores_BK: np.ndarray  # f32; of a domain's rows: scoring.of_domain(rubric, scores_BK[rows]). K = 0 with no rubric


class RubricEvaluator:
    """Grades replies by domain; `environments` and `rubrics` have one entry a domain, in the domains' order.

    Args:
      environments: None for one that grades whole conversations elsewhere: its results come with each call.
      rubrics: None where the domain's environment grades alone; left out, that is so everywhere.
      judge: asked by rubrics with a judge; Judge(config.judge) unless given.

    Raises ValueError as `check`. Close it, or use it as a context manager: it may own processes. Calls must not
    overlap.
    """

    def __init__(
        self,
        environments: Sequence[str | None],
        config: RubricConfig,
        rubrics: Sequence[Rubric | None] | None = None,
        judge=None,
    ):
        self.rubrics = list(rubrics) if rubrics is not None else [None] * len(environments)
        check(environments, config, self.rubrics, judge)
        self._environments = [
            os.path.abspath(name) if name is not None and name.endswith(".py") else name for name in environments
        ]
        self._config = config
        asked = any(rubric is not None and rubric.judged for rubric in self.rubrics)
        self.judge = Judge(config.judge) if asked and judge is None else judge
        self.failures: Counter[tuple[int, str]] = Counter()  # (domain, reason) -> invalid rows so far
        keys = {key for d in range(len(environments)) for key in self._keys(d) if key is not None}
        heavy = sorted(filter(_heavy, keys))
        workers = processors() if config.workers == -1 else config.workers
        self._pool = WorkerPool(heavy, workers, config.timeout_s) if heavy else None
        self._here = {key: load(key) for key in keys if not _heavy(key)}

    def _keys(self, domain: int, meta: Mapping | None = None) -> list[str | None]:
        """What a row of the domain is graded by, by rubric/grading.py's keys; without `meta`, what any row could be."""
        rubric = self.rubrics[domain]
        if rubric is None:
            return [self._environments[domain]]
        return [
            self._key(domain, each.check)
            for each in rubric.criteria
            if each.check.name != "judge" and (meta is None or has(each, meta))
        ]

    def _key(self, domain: int, check: Check) -> str | None:
        return self._environments[domain] if check.name == "environment" else check.key

    def grade(self, domain_B: np.ndarray, rows: Sequence[Mapping], replies: Sequence[str]) -> Grades:
        """Grades of B replies.

        domain_B: i32 (B,), indices into `environments`; rows: data rows with `answer` and perhaps `meta`; replies: B
        texts. Never raises for what a grader does, and always returns (see rubric/pool.py for how long that may take).
        """
        return self.score(domain_B, rows, replies).grades

    def score(
        self,
        domain_B: np.ndarray,
        rows: Sequence[Mapping],
        replies: Sequence[str],
        graded: Mapping[int, Result] = {},
        fresh: bool = False,
    ) -> Scored:
        """As `grade`, with the criterion scores and measures of the domains that have a rubric.

        Args:
          graded: by place in the batch, what an environment made of a whole conversation.
          fresh: ask a judge anew where its answer is on disk.

        A row that a cheap criterion's veto has brought to grade 1 is not asked about.
        """
        if not len(domain_B) == len(rows) == len(replies):
            raise ValueError(
                f"{len(domain_B)} domains, {len(rows)} rows and {len(replies)} replies: one of each a sequence"
            )
        domains = np.asarray(domain_B).tolist()
        here: dict[At, Result | Checked] = {}  # by row and key: criteria may share what is run
        slow: dict[At, Task] = {}
        for place, (domain, row, reply) in enumerate(zip(domains, rows, replies)):
            meta = row.get("meta") or {}
            for key in [] if is_fixed(row) else self._keys(domain, meta):
                task = Task(key, reply, row.get("answer"), meta)
                if key is None:
                    here[place, key] = graded.get(place, _NOT_GRADED)
                elif key in self._here:
                    here[place, key] = answered(self._here[key], task)
                else:
                    slow[place, key] = task
        fixed = {place: Result(float(row["meta"][FIXED]), "") for place, row in enumerate(rows) if is_fixed(row)}
        asked = asking.Asking(self.judge, self._questions(domains, rows, replies, here), fresh)
        done = here | dict(zip(slow, self._pool.run([*slow.values()]))) if slow else here
        return self._scored(domains, rows, done, asked.answers(), fixed)

    def require_loaded(self) -> None:
        """Waits until a worker has loaded the graders. Raises ValueError, one line, for one that cannot be: a user's
        file runs nowhere else, so that nobody knows before. The evaluator is closed then."""
        broken = self._pool.broken() if self._pool is not None else {}
        found = [(d, key) for d in range(len(self.rubrics)) for key in self._keys(d) if key in broken]
        if not found:
            return
        self.close()
        domain, key = next((each for each in found if each[1].endswith(".py")), found[0])
        place = "environment" if self.rubrics[domain] is None else "rubric"
        raise ValueError(
            f"domains[{domain}].{place}: the grader cannot be loaded, {broken[key]}: mend the file, or install what it "
            "imports where the run is"
        )

    def versions(self) -> list[str]:
        """Of each domain's grader, as this process sees it now: rubric/versions.py."""
        return [
            versions.of_domain(environment, rubric, self._config.judge)
            for environment, rubric in zip(self._environments, self.rubrics)
        ]

    def _row(self, domain: int, place: int, meta: Mapping, done: Mapping) -> dict[str, Checked]:
        """What is known of a row's criteria, but for those of a judge."""
        row = {}
        for each in self.rubrics[domain].criteria:
            found = done.get((place, self._key(domain, each.check)))
            if found is not None and has(each, meta):
                row[each.name] = found if isinstance(found, Checked) else _checked(found)
        return row

    def _questions(self, domains: list[int], rows: Sequence[Mapping], replies: Sequence[str], done: Mapping) -> dict:
        """Questions to the judge by (row, criterion)."""
        questions = {}
        for place, (domain, row, reply) in enumerate(zip(domains, rows, replies)):
            rubric, meta = self.rubrics[domain], row.get("meta") or {}
            if rubric is None or not rubric.judged or is_fixed(row):
                continue
            if scoring.vetoed(rubric, self._row(domain, place, meta, done)):
                continue
            for each in rubric.criteria:
                if each.check.name == "judge" and has(each, meta):
                    questions[place, each.name] = asking.question(rubric, each, row, reply)
        return questions

    def _scored(
        self, domains: list[int], rows: Sequence[Mapping], done: Mapping, judged: Mapping, fixed: Mapping[int, Result]
    ) -> Scored:
        graded: list[Graded | Result] = []
        scores_BK = np.full((len(domains), scoring.width(self.rubrics)), np.nan, np.float32)
        for place, domain in enumerate(domains):
            rubric = self.rubrics[domain]
            if place in fixed:
                graded.append(fixed[place])
            elif rubric is None:
                graded.append(done[place, self._environments[domain]])
            else:
                row = self._row(domain, place, rows[place].get("meta") or {}, done)
                row |= {each.name: judged[place, each.name] for each in rubric.criteria if (place, each.name) in judged}
                graded.append(scoring.grade(rubric, row))
                line = scoring.columns(rubric, row, graded[-1].score)
                scores_BK[place, : len(line)] = line
            if graded[-1].grade is None:
                self._count(domain, graded[-1].reason)
        return Scored(self._grades(graded), scores_BK)

    def _count(self, domain: int, reason: str) -> None:
        known = (domain, reason) in self.failures or len(self.failures) < _MANY_REASONS
        self.failures[(domain, reason if known else "other reasons")] += 1

    def _grades(self, results: Sequence[Result | Graded]) -> Grades:
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


_NOT_GRADED = Result(None, "its environment graded no conversation")


def is_fixed(row: Mapping) -> bool:
    """Whether every reply to the row has one grade, so that nothing is rewarded."""
    meta = row.get("meta") or {}
    return FIXED in meta and "rehearsal" in meta  # rows that M0 wrote, and no others


def _heavy(key: str) -> bool:
    """Whether a grader or check is for a worker process."""
    return checks.heavy(checks.name_of(key)) if key.startswith(checks.PREFIX) else key not in CHEAP


def _checked(result: Result) -> Checked:
    return Checked(None, result.reason, {}) if result.grade is None else checks.of_grade(result.grade)
