"""What a person sees while a run goes on, and the table at its end. On a terminal a live view, in a pipe one line a step."""

import io

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from infinite_jax import statistics
from infinite_jax.heldout import DomainResult, average, passed


class Progress:
    """Context manager; `show` takes each step's metrics."""

    def __init__(self, names: list[str], steps: int, start: int):
        self.names, self.steps, self.console = names, steps, Console()
        self._held_out: dict[str, float | None] = {}
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        )
        self._task = self._bar.add_task("training", total=steps, completed=start)
        self._live = Live(self._bar, console=self.console, refresh_per_second=4) if self.console.is_terminal else None

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live:
            self._live.stop()

    def show(self, step: int, metrics: dict) -> None:
        self._held_out |= {key: value for key, value in metrics.items() if key.startswith("eval/")}
        reward = number(metrics.get("reward/mean"))
        if self._live:
            self._bar.update(self._task, completed=step, description=f"reward {reward}")
            self._live.update(Group(self._table(metrics), self._bar))
            return
        seconds = sum(value for key, value in metrics.items() if key.startswith("time/") and key.endswith("_s"))
        line = f"step {step}/{self.steps}  reward {reward}  {seconds:.1f} s"
        if "eval/macro" in metrics:
            line += f"  held-out macro {number(metrics['eval/macro'])}"
        print(line, flush=True)

    def _table(self, metrics: dict) -> Table:
        table = Table("domain", "share", "band", "pass (EMA)", "pass (step)", "held-out")
        for name in self.names:
            band = metrics.get(f"triage/band/{name}")
            table.add_row(
                name,
                number(metrics.get(f"triage/share/{name}")),
                "-" if band is None else ("low", "medium", "high")[int(band)],
                number(metrics.get(f"triage/acc_ema/{name}")),
                number(metrics.get(f"pass_rate/{name}")),
                number(self._held_out.get(f"eval/pass_rate/{name}")),
            )
        return table


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def interval(rate: float | None, prompts: int) -> str:
    """A pass rate with its 95 % Wilson interval."""
    if rate is None:
        return "-"
    low, high = statistics.wilson(round(rate * prompts), prompts)
    return f"{rate:.3f} [{low:.3f}, {high:.3f}]"


def results_table(results: dict[str, DomainResult]) -> str:
    """Held-out pass rates of one evaluation, with 95 % intervals clustered by prompt, as text."""
    sampled = any(result.sampled_NS is not None for result in results.values())
    table = Table("domain", "prompts", "greedy pass rate", *(["pass@1 at T = 1"] if sampled else []), "mean grade")
    greedy, rates = {}, {}
    for name, result in results.items():
        greedy[name] = passed(result.greedy_N)[:, None]
        cells = [str(len(result.greedy_N)), interval(average(greedy[name]), len(greedy[name]))]
        if sampled:
            rates[name] = passed(result.sampled_NS)
            cells.append(estimate(statistics.cluster_mean(rates[name])))
        table.add_row(name, *cells, number(average(result.greedy_N)))
    table.add_section()
    averages = [estimate(statistics.macro_average(list(values.values()))) for values in (greedy, rates) if values]
    table.add_row("macro average", str(sum(len(values) for values in greedy.values())), *averages, "")
    return as_text(table)


def as_text(table: Table) -> str:
    console = Console(file=io.StringIO(), width=110)
    console.print(table)
    return console.file.getvalue().rstrip()


def before_after(names: list[str], rows: list[dict], sizes: dict[str, int]) -> str:
    """Held-out pass rates at step 0 and at the last evaluation, as text."""
    evaluated = [row for row in rows if "eval/macro" in row]
    first, last = evaluated[0], evaluated[-1]
    table = Table("domain", "prompts", f"step {first['step']}", f"step {last['step']}", "change", title="held-out pass rate")
    for name in names:
        before, after = first[f"eval/pass_rate/{name}"], last[f"eval/pass_rate/{name}"]
        change = "-" if None in (before, after) else f"{after - before:+.3f}"
        table.add_row(name, str(sizes[name]), interval(before, sizes[name]), interval(after, sizes[name]), change)
    before, after = first["eval/macro"], last["eval/macro"]
    change = "-" if None in (before, after) else f"{after - before:+.3f}"
    table.add_section()
    table.add_row("macro average", str(sum(sizes.values())), number(before), number(after), change)
    return as_text(table)
