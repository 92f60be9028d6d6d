"""Threads for checks that wait on others: a limit of time for each item, and one that hangs is left behind.

A thread cannot be stopped. One that is past its limit is given up: its item is settled as late, a new thread takes its
place, and what it says later is dropped. Threads are daemons, so that none keeps the interpreter from ending.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

Item, Answer = TypeVar("Item"), TypeVar("Answer")


def each(
    work: Callable[[Item], Answer],
    items: Sequence[Item],
    workers: int,
    limit_s: float,
    failed: Callable[[str, BaseException | None], Answer],
) -> list[Answer]:
    """`work` of every item, in order, at most `workers` at a time.

    Args:
      limit_s: seconds that one item may take from the moment its work begins.
      failed: what stands for an item whose work raised (reason, the exception) or ran past the limit (reason, None).
    """
    answers: dict[int, Answer] = {}
    running: dict[int, float] = {}  # item -> the time by which it must be done
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    changed = threading.Condition()
    for place in range(len(items)):
        waiting.put(place)

    def run() -> None:
        while True:
            try:
                place = waiting.get_nowait()
            except queue.Empty:
                return
            with changed:
                running[place] = time.monotonic() + limit_s
                changed.notify()
            try:
                answer = work(items[place])
            except BaseException as error:
                answer = failed(type(error).__name__, error)
            with changed:
                if running.pop(place, None) is None:
                    return  # too late: another thread is in this one's place
                answers[place] = answer
                changed.notify()

    def start() -> None:
        threading.Thread(target=run, daemon=True, name="rubric").start()

    for _ in range(min(workers, len(items))):
        start()
    with changed:
        while len(answers) < len(items):
            now = time.monotonic()
            for place in [place for place, due in running.items() if due <= now]:
                del running[place]
                answers[place] = failed(f"timeout: over {limit_s:g} s", None)
                start()
            due = min(running.values(), default=now + limit_s)
            if len(answers) < len(items):
                changed.wait(max(0.0, min(due - time.monotonic(), limit_s)))
    return [answers[place] for place in range(len(items))]
