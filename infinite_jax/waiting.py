"""Progress of what takes long before a run begins: bars on a terminal, a line a tenth of the way elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

QUICK = 5.0  # seconds that pass without a line where there is no terminal


@contextlib.contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """Gives a function of (stage, done, total), to be called now and then; shows on standard error."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    columns = TextColumn("contamination: {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        tasks = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done)

        yield show


def _lines() -> Callable[[str, int, int], None]:
    began, said = {}, {}

    def show(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        began.setdefault(stage, now)
        tenth = 10 * done // max(total, 1)
        if tenth > said.get(stage, 0) and now - began[stage] > QUICK:
            said[stage] = tenth
            left = (now - began[stage]) * (total - done) / done
            print(f"contamination: {stage}: {done:,} of {total:,}, {left:,.0f} s left", file=sys.stderr, flush=True)

    return show
