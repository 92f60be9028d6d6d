"""Few-shot chat rows: three solved examples as earlier turns, then the question.

The examples are fixed for a domain and level, not drawn for each row. So what distinguishes two rows is their question
alone (their `key`), every prompt is measured under the same context, and one key a level is all that keeps an example
from being asked: `draw` passes over the three. They come from the task itself and have three different answers, so that
repeating one is not a strategy. Small models score about 0 on instructions and tool calls without them.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from curriculum.generators import Generator, Row

SHOTS = 3
WORDS = (Path(__file__).parent / "words.txt").read_text().split()  # common English nouns of 3 to 11 letters


class Task(NamedTuple):
    """One instance of a domain, before the turns around it."""

    question: str
    reply: str  # in the asked form: what an example's assistant turn says
    meta: dict[str, Any]  # for the grader
    key: str  # canonical
    answer: Any = None  # where the grader wants other than the reply


def few_shot(
    environment: str, levels: int, make: Callable[[np.random.Generator, int], Task], system: str | None = None
) -> Generator:
    """The generator of `make`'s tasks after SHOTS examples; `system` is a leading system turn."""

    @functools.cache
    def shown(difficulty: int) -> tuple[list[dict[str, str]], frozenset[str]]:
        """The turns before the question, and the examples' keys; seeded by the level, whatever the run's seed is."""
        rng, examples = np.random.default_rng(difficulty), {}
        while len(examples) < SHOTS:
            task = make(rng, difficulty)
            examples.setdefault(task.reply, task)
        turns = [] if system is None else [{"role": "system", "content": system}]
        for task in examples.values():
            turns.append({"role": "user", "content": task.question})
            turns.append({"role": "assistant", "content": task.reply})
        return turns, frozenset(task.key for task in examples.values())

    def draw(rng: np.random.Generator, difficulty: int) -> Row:
        turns, taken = shown(difficulty)
        task = make(rng, difficulty)
        while task.key in taken:
            task = make(rng, difficulty)
        messages = [*turns, {"role": "user", "content": task.question}]
        answer = task.reply if task.answer is None else task.answer
        return {"messages": messages, "answer": answer, "meta": task.meta, "key": task.key}

    return Generator(environment, levels, draw)
