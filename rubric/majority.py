"""What a model's own replies agree on, with the domain's grader as the judge of whether two replies say the same.

Each reply is read as an answer; one that passes against another's answer votes for it (self-consistency: Wang et al.,
2203.11171). The answer of most votes is the majority's.

Graders that need no answer take no part, nor those that read more of a row than it: tests, instructions, constraints.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rubric.evaluator import PASS_GRADE
from rubric.reading import NUMBER, boxed, json_objects, tagged
from rubric.schema import Rubric

BY_ANSWER = ("eq", "orz", "number", "line", "list", "json_call")  # graders that compare with an answer, of GRADERS
BY_ROW = ("python_tests", "asserts", "gym", "ifeval", "constraints")  # those that compare with what a row's meta says
READ_ANSWER = (*BY_ANSWER, "environment", "match", "choice", "quantity", "unit")  # checks of rubrics


class Majority(NamedTuple):
    answer: object  # None: no reply can be read as an answer
    share: float  # of all replies that agree with it


def needs_answer(environment: str, rubric: Rubric | None) -> bool:
    """Whether a row needs an answer to be graded. A .py file is taken to need one."""
    if rubric is None:
        return environment not in BY_ROW
    checks = [each.check.name for each in rubric.criteria]
    return any(name in READ_ANSWER or name.endswith(".py") for name in checks)


def candidate(environment: str, reply: str) -> object:
    """The reply as an answer that its domain's grader could compare with; None where it is none."""
    text = reply.strip()
    if environment == "json_call":
        calls = [call for call in json_objects(text) if isinstance(call.get("arguments"), dict) and "name" in call]
        return calls[0] if len(calls) == 1 else None
    if environment == "number":
        found = {number.replace(",", "") for number in NUMBER.findall(text.replace("−", "-"))}
        return found.pop() if len(found) == 1 else None
    if environment == "line":
        return text.split("\n", 1)[0].strip() or None
    marked = boxed(text) if environment == "orz" else None
    marked = tagged(text) if marked is None and environment in ("eq", "orz") else marked
    return (text if marked is None else marked.strip()) or None


def distinct(candidates: Sequence[object]) -> list[object]:
    """The different answers among a prompt's replies, in order; None, a reply that is none, left out."""
    return [each for n, each in enumerate(candidates) if each is not None and each not in candidates[:n]]


def majority(answers: Sequence[object], grade_AN: np.ndarray) -> Majority:
    """The answer that most of the N replies pass against; of several, the one that came first.

    grade_AN: of each reply against each of the A answers, as rubric.evaluator grades; NaN where it could not be graded.
    """
    if not answers:
        return Majority(None, 0.0)
    votes_A = (grade_AN >= PASS_GRADE).sum(axis=1)
    best = int(votes_A.argmax())
    return Majority(answers[best], float(votes_A[best]) / grade_AN.shape[1]) if votes_A[best] else Majority(None, 0.0)
