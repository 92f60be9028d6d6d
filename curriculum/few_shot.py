"""Few-shot chat rows: three solved examples as earlier turns, then the question.

The examples are fixed for a domain and level, not drawn for each row. So two rows differ in their question alone, which
is what `key` says, and pass rates compare prompts under one and the same context. The three are never asked themselves:
`draw` passes over them, on both sides of the split. They come from the task and have three different answers, so that
repeating one is no strategy.
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
    between: tuple[tuple[str, str], ...] = ()  # (role, text) of an example's turns between question and reply


def few_shot(
    environment: str,
    levels: int,
    make: Callable[[np.random.Generator, int], Task],
    system: str | None = None,
    examples_seed: int = 0,
) -> Generator:
    """The generator of `make`'s tasks after SHOTS examples; `system` is a leading system turn.

    `examples_seed` picks the examples, for tasks of several kinds where the first draw shows one kind only.
    """

    @functools.cache
    def shown(difficulty: int) -> tuple[list[dict[str, str]], frozenset[str]]:
        """The turns before the question, and the examples' keys; the same whatever the run's seed is."""
        rng, examples = np.random.default_rng([examples_seed, difficulty]), {}
        while len(examples) < SHOTS:
            task = make(rng, difficulty)
            examples.setdefault(task.reply, task)
        turns = [] if system is None else [{"role": "system", "content": system}]
        for task in examples.values():
            turns.append({"role": "user", "content": task.question})
            turns += [{"role": role, "content": text} for role, text in task.between]
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
