"""What a person sees of a run: a live view on a terminal, one line a step in a pipe, and the tables at the end."""

import io
from collections.abc import Mapping

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from infinite_jax import heldout, statistics
from infinite_jax.heldout import average, passed


class Progress:
    """Context manager; `show` takes each step's metrics."""

    def __init__(self, names: list[str], steps: int, start: int):
        self.names, self.steps = names, steps
        self.console = Console(markup=False, emoji=False)  # names of domains are text, brackets and all
        self._held_out: dict[str, float | None] = {}
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
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
        seconds = metrics.get("time/step_s", 0.0) + metrics.get("time/evaluate_s", 0.0)
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


def estimate(found: statistics.Estimate | None, signed: bool = False) -> str:
    """An estimate with its 95 % interval."""
    if found is None:
        return "-"
    form = "{:+.3f} [{:+.3f}, {:+.3f}]" if signed else "{:.3f} [{:.3f}, {:.3f}]"
    return form.format(*found)


def results_table(results: heldout.Results) -> str:
    """Held-out pass rates of one evaluation, with 95 % intervals clustered by prompt, as text."""
    kinds = [("greedy pass rate", {name: passed(result.greedy_N)[:, None] for name, result in results.items()})]
    if all(result.sampled_NS is not None for result in results.values()):
        kinds.append(("pass@1 at T = 1", {name: passed(result.sampled_NS) for name, result in results.items()}))
    table = Table("domain", "prompts", *(title for title, _ in kinds), "mean grade", box=box.MARKDOWN)
    for name, result in results.items():
        cells = [estimate(statistics.cluster_mean(values[name])) for _, values in kinds]
        table.add_row(name, str(len(result.greedy_N)), *cells, number(average(result.greedy_N)))
    macro = [estimate(statistics.macro_average(list(values.values()))) for _, values in kinds]
    table.add_row("macro average", str(sum(len(result.greedy_N) for result in results.values())), *macro, "")
    return as_text(table)


def before_after(
    before: heldout.Results, after: heldout.Results, steps: tuple[int, int], regraded: Mapping[str, int] = {}
) -> str:
    """Greedy held-out pass rates of two evaluations of the same prompts, with paired 95 % intervals, as text.

    A domain that only one of them has, added in between, is left out. regraded: domains whose grader changed in
    between, with the step; they are marked.
    """
    shared = [name for name in before if name in after]
    sides = [{name: passed(each[name].greedy_N)[:, None] for name in shared} for each in (before, after)]
    table = Table("held-out domain", "prompts", *(f"step {step}" for step in steps), "change", box=box.MARKDOWN)
    for name in shared:
        change = statistics.paired_difference([sides[0][name]], [sides[1][name]])
        rates = [estimate(statistics.cluster_mean(side[name])) for side in sides]
        mark = " *" if name in regraded else ""
        table.add_row(name + mark, str(len(sides[0][name])), *rates, estimate(change, signed=True))
    lists = [list(side.values()) for side in sides]
    rates = [estimate(statistics.macro_average(values)) for values in lists]
    change = estimate(statistics.paired_difference(*lists), signed=True)
    marked = [f"{name} (step {regraded[name]})" for name in shared if name in regraded]
    table.add_row("macro average" + " *" * bool(marked), str(sum(map(len, lists[0]))), *rates, change)
    note = f"\n* another grader since: {', '.join(marked)}: what changed there is not the policy's alone"
    return as_text(table) + note * bool(marked)


def as_text(table: Table) -> str:
    console = Console(  # whatever the environment says; names are text, brackets and all
        file=io.StringIO(), width=120, color_system=None, force_terminal=False, markup=False, emoji=False
    )
    console.print(table)
    return console.file.getvalue().rstrip()
