"""M0 before an upgrade: its pass rates, what the scheduler makes of them, and what the monitor will be able to see.

M0 answers, greedily, upgrade.baseline x eval.prompts distinct test prompts of each domain, or all of them
where there are fewer. RUN_DIR/baseline.npz keeps every grade, in the format of an evaluation.

The visible drop of a prior domain is the least that an evaluation of n prompts calls a violation with probability POWER
(curriculum/drops.py, unpaired), for the pass rate (K + 1) / (N + 2): a measured rate of 0 or 1 has no variance.
"""

import zipfile
from pathlib import Path

import jax
import numpy as np
from rich import box
from rich.table import Table

from configs.schema import Config
from curriculum import drops, triage
from infinite_jax import heldout, progress, ungraded
from infinite_jax.heldout import Results, average, passed
from infinite_jax.session import Session
from infinite_jax.types import RunState
from sharding import exchange, multihost

FILE = "baseline.npz"
POWER = 0.8


def begin(session: Session, run_dir: Path, state: RunState) -> RunState:
    """The state before step 0 of an upgrade, M0 measured, saved and told; `state` itself in other runs.

    All processes call it together; afterwards all can `read`.
    """
    if session.baseline is None:
        return state
    results = session.baseline.run(state.train.params)
    ungraded.refuse(session, results)
    if multihost.is_first():
        heldout.save(run_dir / FILE, results)
        print(report(session, results))
    exchange.barrier("baseline")
    rates = [average(passed(results[name].greedy_N)) for name in session.names]
    rate_D = np.array([np.nan if rate is None else rate for rate in rates], np.float32)
    informed = triage.measured(session.config.curriculum, jax.device_get(state.curriculum), rate_D)
    return state._replace(curriculum=exchange.replicated(session.mesh, informed))


def read(config: Config, run_dir: Path) -> Results:
    """M0's results of a run that is continued. Raises ValueError, one line, where they are missing or damaged."""
    return load(config, run_dir / FILE)


def load(config: Config, path: Path) -> Results:
    """Results of all domains. Raises ValueError, one line."""
    try:
        found = heldout.load(path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: missing or damaged ({error}): restore it from a backup, or start again") from error
    if missing := [domain.name for domain in config.domains if domain.name not in found]:
        raise ValueError(f"{path}: nothing of domain {missing[0]}: restore the file from a backup, or start again")
    return found


def report(session: Session, results: Results) -> str:
    """The table that is printed before training, and a line on domains with few prompts."""
    config, few, known = session.config, [], {}
    asked = config.upgrade.baseline * config.eval.prompts
    priors = sum(not domain.new for domain in config.domains)
    titles = ("domain", "kind", "training prompts", "M0's pass rate", "of prompts", "an evaluation's", "visible drop")
    table = Table(*titles, box=box.MARKDOWN)
    sizes = np.asarray(session.trainer.stream.sets.size_D)
    for d, domain in enumerate(config.domains):
        verdicts = passed(results[domain.name].greedy_N)
        verdicts = verdicts[~np.isnan(verdicts)]
        known[domain.name] = len(verdicts)
        n = sum(prompt.domain == d for prompt in session.evaluator.test)
        if len(results[domain.name].greedy_N) < asked:
            few.append(domain.name)
        table.add_row(
            domain.name,
            "new" if domain.new else "prior",
            "none, KL anchor only" if domain.eval_only else str(sizes[d]),
            progress.number(average(verdicts)),
            str(len(verdicts)),
            str(n),
            "-" if domain.new else least_drop(config, verdicts, n, priors),
        )
    lines = [progress.as_text(table)]
    if blind := [row.name for row in config.domains if not row.new and not known[row.name]]:
        lines.append(f"no grade of M0's, so not watched: {', '.join(blind)}")
    if few:
        lines.append(f"fewer than {asked} distinct test prompts, all taken for M0: {', '.join(few)}")
    return "\n".join(lines)


def least_drop(config: Config, verdicts: np.ndarray, n: int, priors: int) -> str:
    """Of a prior domain, as text; none where it is more than M0's rate, - without a verdict."""
    if not len(verdicts) or not n:
        return "-"
    rate = (verdicts.sum() + 1) / (len(verdicts) + 2)
    rule = config.upgrade.monitor
    drop = drops.detectable_drop(n, len(verdicts), priors, rule.alpha, rule.delta, rate * (1 - rate), POWER)
    return progress.number(drop) if drop <= verdicts.mean() else "none"
