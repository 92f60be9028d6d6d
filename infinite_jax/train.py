"""The main job.

    python -m infinite_jax.train [--config-name NAME] [--config-dir DIR] [key=value ...]

With no argument: the embedded model on the embedded domains, minutes on two CPU cores, no network.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from configs import cli
from configs.schema import located
from infinite_jax import baseline, gate, heldout, record, rehearsal, rollback, run_folder, safety, transcripts, ungraded
from infinite_jax.checkpoint import Checkpointer
from infinite_jax.clock import Clock, CompilationCounter
from infinite_jax.equal_groups import EqualGroups
from infinite_jax.grader_watch import GraderWatch
from infinite_jax.lock import RunLock
from infinite_jax.progress import Progress, before_after
from infinite_jax.session import Session, open_session, set_up_runtime
from infinite_jax.types import RunState
from sharding import exchange, multihost


def main(argv: Sequence[str] | None = None) -> int:
    arguments = cli.parser("train", __doc__.splitlines()[0])
    cli.add_config_arguments(arguments)
    cli.add_process_arguments(arguments)
    return begin(arguments.parse_args(argv))


def begin(given: argparse.Namespace) -> int:
    """A run from its configuration on. given: what cli.add_config_arguments and add_process_arguments ask for."""
    with RunLock() as lock:
        return _begin(given, lock)


def _begin(given: argparse.Namespace, lock: RunLock) -> int:
    with cli.bad_input():
        config = located(cli.compose_config(given.config_name, given.config_dir, given.overrides))
        set_up_runtime(config)
        cli.join_processes(given)
        run_dir = run_folder.choose(config)
        if config.upgrade.active:
            config = rehearsal.prepare(config, run_dir, lock)
        screened = gate.screen(config)
        session = None if screened.halted else open_session(config, screened.domains)
        try:
            run_folder.hold(lock, run_dir)
            gate.write(run_dir / gate.FOLDER, screened)  # before config.yaml, with which the folder is a run
            if session:
                run_folder.claim(run_dir, config, session.data_sha256)
        except BaseException:
            if session:
                session.close()
            raise
    if session is None:
        multihost.shutdown()
        return cli.HALTED
    with session:
        code = train(session._replace(state=None), run_dir, session.state)
    multihost.shutdown()
    return code


def train(session: Session, run_dir: Path, state: RunState, after: int | None = None) -> int:
    """All steps up to run.steps, or those after the restored step `after`; some again, where the run goes back.

    All processes run it together; the first one writes and shows. Returns the exit code: 0 done, 3 halted by the
    monitor of an upgrade, 75 stopped by SIGTERM or Ctrl-C after saving.
    """
    abstract = run_folder.abstract(state)
    while True:
        code, back = attempt(session, run_dir, state, after)
        if back is None:
            return code
        with multihost.shared_fate():
            state = None  # one copy of it at a time
            rollback.write(run_dir, back)
            say(f"step {back['at']}: {back['kind']} to step {back['to']}: {back['because']}")
            if back["kind"] == safety.HALT:
                say(rollback.halted(run_dir))
                return cli.HALTED
            if code == cli.PREEMPTED:
                say(outcome_of(run_dir, back["to"], True, True))
                return code
            after, state = rollback.go_back(session, run_dir, abstract)


def say(line: str) -> None:
    if multihost.is_first():
        print(line, flush=True)


def attempt(session: Session, run_dir: Path, state: RunState, after: int | None) -> tuple[int, dict | None]:
    """(exit code, None) at the end, or what the journal is to say of the way back (rollback.py)."""
    run, stop, start = session.config.run, StopSignal(), after or 0
    step, last, stopping, failures = start, False, False, Failures(session)
    saves = run.checkpoint_every > 0 or safety.acts(session.config)
    compilations, equal = CompilationCounter(), EqualGroups(session.config)
    multihost.advise(remedy(run_dir, after))
    with (
        Checkpointer(run_dir / "checkpoints", run.keep_last, run.keep_best, after) as checkpoints,
        multihost.on_first(record.RunLog, run_dir, session.names, start) as log,
        multihost.on_first(Progress, session.names, run.steps, start) as progress,
        stop,
        multihost.shared_fate(),
    ):
        if after is None:
            state = baseline.begin(session, run_dir, state)
            metrics, graders, watch = measure_start(session, run_dir, state)
            log.write(0, metrics)
            progress.show(0, metrics)
            failures.warn()
            if saves:
                save(checkpoints, log, 0, state, metrics)
        else:
            watch = safety.start(session, run_dir, evaluation_file(run_dir, 0))
            graders = GraderWatch.resume(session, run_dir, after)
        for step in range(start + 1, run.steps + 1):
            before = state._replace(train=None)  # the step donates it
            state, outcome = graders.after(step, before, *session.trainer.step(state))
            metrics, sampled = outcome.metrics, outcome.sampled
            last, verdict = step == run.steps or 0 < run.tokens <= state.tokens, safety.Verdict(state, {})
            if last or step % run.eval_every == 0:
                of_evaluation, results = evaluate(session, run_dir, step, state)
                verdict = safety.judge(watch, step, state, results, run.eval_every)
                metrics, state = metrics | of_evaluation | verdict.metrics, verdict.state
                del results
            metrics |= {"time/compilations": compilations.since_last()} | record.memory()
            log.write(step, metrics, [*outcome.events, *verdict.events])
            if transcripts.due(step, run.eval_every):
                log.transcribe(transcripts.pick(step, sampled.chosen, sampled.replies, sampled.grades, session.names))
            progress.show(step, metrics)
            failures.warn()
            equal.after(metrics)
            if run.check_every and step % run.check_every == 0:
                exchange.check_same(state._replace(train=None), f"step {step}")
            stopping = any(exchange.gather(stop.asked))
            if verdict.back:
                log.sync()
                return cli.PREEMPTED if stopping else cli.DONE, verdict.back
            due = run.checkpoint_every and step % run.checkpoint_every == 0
            if saves and (due or last or stopping or verdict.clean):
                save(checkpoints, log, step, state, metrics, safety.held(before, state))
            multihost.advise(remedy(run_dir, checkpoints.verified))
            if stopping or last:
                log.draw()
                break
    say(outcome_of(run_dir, step, stopping and not last, saves))
    return cli.PREEMPTED if stopping and not last else cli.DONE, None


def measure_start(session: Session, run_dir: Path, state: RunState) -> tuple[dict, GraderWatch, safety.Watch | None]:
    """The evaluation of step 0, and the watches over graders and prior domains that begin with it."""
    metrics, results = evaluate(session, run_dir, 0, state)
    ungraded.refuse(session, results)
    graders = GraderWatch.start(session, run_dir, results)
    watch = safety.start(session, run_dir, results)
    verdict = safety.judge(watch, 0, state, results, session.config.run.eval_every)
    return metrics | verdict.metrics, graders, watch


def outcome_of(run_dir: Path, step: int, stopped: bool, saved: bool) -> str:
    """How the run ended, and what came of it, in words."""
    if stopped and not saved:
        return f"stopped at step {step}; nothing was saved: run.checkpoint_every=0"
    if stopped:
        return f"stopped at step {step}, saved; continue with: python -m infinite_jax.resume {run_dir}"
    ends = (0, step)
    files = [evaluation_file(run_dir, step) for step in ends]
    regraded = record.regraded(record.read(run_dir / record.EVENTS))
    table = [before_after(*map(heldout.load, files), ends, regraded)] if all(file.is_file() for file in files) else []
    return "\n".join([*table, f"run: {run_dir}"])


def remedy(run_dir: Path, saved: int | None) -> str:
    """What to do where a process is lost."""
    if saved is None:
        return "nothing was saved yet"
    return f"saved up to step {saved}; continue with: python -m infinite_jax.resume {run_dir}"


def evaluate(session: Session, run_dir: Path, step: int, state: RunState) -> tuple[dict, heldout.Results]:
    clock = Clock()
    results = session.evaluator.run(state.train.params)
    if multihost.is_first():
        heldout.save(evaluation_file(run_dir, step), results)
    canary = session.canary.run(state.train.params) if session.canary else {}
    clock.lap("evaluate")
    return heldout.metrics(results, session.grader.rubrics) | canary | clock.seconds, results


def evaluation_file(run_dir: Path, step: int) -> Path:
    return run_dir / "evaluations" / f"{step}.npz"


class Failures:
    """Says why a domain's graders gave no answer, one line for each new reason: such rows train nothing."""

    def __init__(self, session: Session):
        self.session, self._said = session, set()

    def warn(self) -> None:
        """Of all processes' rows; all call it together."""
        new = {key: rows for key, rows in self.session.grader.failures.items() if key not in self._said}
        for (domain, reason), rows in ungraded.of_all(new).items():
            self._said.add((domain, reason))
            if multihost.is_first():
                name = self.session.names[domain]
                print(f"warning: domain {name}: {rows} replies could not be graded: {reason}", file=sys.stderr)


def save(
    checkpoints: Checkpointer, log: record.RunLog, step: int, state: RunState, metrics: dict, keep: tuple[int, ...] = ()
) -> None:
    log.sync()  # a saved step must not be ahead of its row
    checkpoints.save(step, state, metrics.get("eval/macro"), keep)


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
