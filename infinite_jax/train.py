"""The main job.

    python -m infinite_jax.train [--config-name NAME] [--config-dir DIR] [key=value ...]

With no argument: the embedded model on the embedded domains, minutes on two CPU cores, no network.
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from configs import cli
from configs.schema import located
from infinite_jax import heldout, record, run_folder, transcripts
from infinite_jax.checkpoint import Checkpointer
from infinite_jax.clock import Clock, CompilationCounter
from infinite_jax.progress import Progress, before_after
from infinite_jax.session import Session, open_session, set_up_runtime
from infinite_jax.types import RunState


def main(argv: Sequence[str] | None = None) -> int:
    arguments = cli.parser("train", __doc__.splitlines()[0])
    cli.add_config_arguments(arguments)
    given = arguments.parse_args(argv)
    with cli.bad_input():
        config = located(cli.compose_config(given.config_name, given.config_dir, given.overrides))
        run_dir = run_folder.choose(config)
        set_up_runtime(config)
        session = open_session(config)
        run_folder.save_config(run_dir, config, session.data_sha256)
    with session.grader:
        return train(session._replace(state=None), run_dir, session.state)


def train(session: Session, run_dir: Path, state: RunState, after: int | None = None) -> int:
    """All steps up to run.steps, or those after the restored step `after`.

    Returns the exit code: 0 done, 75 stopped by SIGTERM or Ctrl-C after saving.
    """
    run, stop, start = session.config.run, StopSignal(), after or 0
    step, last, warned = start, False, set()
    compilations = CompilationCounter()
    with (
        Checkpointer(run_dir / "checkpoints", run.keep_last, run.keep_best, after) as checkpoints,
        record.RunLog(run_dir, session.names, start) as log,
        Progress(session.names, run.steps, start) as progress,
        stop,
    ):
        if after is None:
            metrics = evaluate(session, run_dir, 0, state)
            log.write(0, metrics)
            progress.show(0, metrics)
            warn_of_failures(session, warned)
            if run.checkpoint_every:
                save(checkpoints, log, 0, state, metrics)
        for step in range(start + 1, run.steps + 1):
            state, outcome = session.trainer.step(state)
            metrics, sampled = outcome.metrics, outcome.sampled
            last = step == run.steps or 0 < run.tokens <= state.tokens
            if last or step % run.eval_every == 0:
                metrics |= evaluate(session, run_dir, step, state)
            metrics |= {"time/compilations": compilations.since_last()} | record.memory()
            log.write(step, metrics, outcome.events)
            if transcripts.due(step, run.eval_every):
                log.transcribe(transcripts.pick(step, sampled.chosen, sampled.replies, sampled.grades, session.names))
            progress.show(step, metrics)
            warn_of_failures(session, warned)
            if run.checkpoint_every and (last or stop.asked or step % run.checkpoint_every == 0):
                save(checkpoints, log, step, state, metrics)
            if stop.asked or last:
                log.draw()
                break
    if stop.asked and not last and not run.checkpoint_every:
        print(f"stopped at step {step}; nothing was saved: run.checkpoint_every=0")
        return cli.PREEMPTED
    if stop.asked and not last:
        print(f"stopped at step {step}, saved; continue with: python -m infinite_jax.resume {run_dir}")
        return cli.PREEMPTED
    ends = (0, step)
    files = [evaluation_file(run_dir, step) for step in ends]
    if all(file.is_file() for file in files):
        print(before_after(*map(heldout.load, files), ends))
    print(f"run: {run_dir}")
    return cli.DONE


def evaluate(session: Session, run_dir: Path, step: int, state: RunState) -> dict:
    clock = Clock()
    results = session.evaluator.run(state.train.params)
    heldout.save(evaluation_file(run_dir, step), results)
    canary = session.canary.run(state.train.params) if session.canary else {}
    clock.lap("evaluate")
    return heldout.metrics(results) | canary | clock.seconds


def evaluation_file(run_dir: Path, step: int) -> Path:
    return run_dir / "evaluations" / f"{step}.npz"


def warn_of_failures(session: Session, warned: set) -> None:
    """One line for each new reason why a domain's grader gave no answer: such rows train nothing."""
    for (domain, reason), rows in session.grader.failures.items():
        if (domain, reason) not in warned:
            warned.add((domain, reason))
            name = session.names[domain]
            print(f"warning: domain {name}: {rows} replies could not be graded: {reason}", file=sys.stderr)


def save(checkpoints: Checkpointer, log: record.RunLog, step: int, state: RunState, metrics: dict) -> None:
    log.sync()  # a saved step must not be ahead of its row
    checkpoints.save(step, state, metrics.get("eval/macro"))


class StopSignal:
    """Within it, SIGTERM or the first Ctrl-C asks the loop to save and stop; the next Ctrl-C interrupts at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _ask(self, number: int, _frame) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
