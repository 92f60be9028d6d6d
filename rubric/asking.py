"""The judge's part in the grading of a batch: which rows it is asked about, and its answers while workers run."""

import threading
from collections.abc import Mapping

from rubric.checks import Checked
from rubric.judge import SelfJudge, Verdict
from rubric.schema import Criterion, Rubric
from rubric.verdict import Question

At = tuple[int, str]  # row and criterion


def question(rubric: Rubric, criterion: Criterion, row: Mapping, reply: str) -> Question:
    options = criterion.check.given()
    levels, task = options.get("levels") or {}, row.get("messages") or ()
    return Question(rubric.about, options["question"], levels, task, row.get("answer"), reply)


class Asking:
    """Questions under way in a thread, so that workers grade meanwhile; a SelfJudge waits for the caller's thread."""

    def __init__(self, judge, questions: Mapping[At, Question], fresh: bool):
        self._judge, self._questions, self._fresh = judge, questions, fresh
        self._found: list[Verdict] = []
        self._thread = None
        if questions and not isinstance(judge, SelfJudge):
            self._thread = threading.Thread(target=self._ask, daemon=True, name="judge")
            self._thread.start()

    def _ask(self) -> None:
        try:
            self._found = self._judge.answers(list(self._questions.values()), self._fresh)
        except Exception as error:  # a judge of the caller's own
            self._found = [Verdict(None, type(error).__name__)] * len(self._questions)

    def answers(self) -> dict[At, Checked]:
        """Waits for them."""
        if self._thread is not None:
            self._thread.join()
        elif self._questions:
            self._ask()
        return {at: _checked(found) for at, found in zip(self._questions, self._found, strict=True)}


def _checked(found: Verdict) -> Checked:
    if found.grade is None:
        return Checked(None, found.reason, {})
    return Checked((found.grade - 1) / 3, "", {"judge_grade": float(found.grade)})
