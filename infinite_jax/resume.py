"""Continues a run bit for bit from its newest intact checkpoint; domains may be added to it and retired.

python -m infinite_jax.resume RUN_DIR [run.steps=N] [key=value ...] [add=more.yaml] [retire=NAME]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from configs import cli
from configs.schema import RunConfig
from infinite_jax import changes, gate, grader_watch, record, rollback, run_folder, safety
from infinite_jax.changes import Changes
from infinite_jax.gate import Screened
from infinite_jax.lock import RunLock
from infinite_jax.session import Session, open_session, set_up_runtime
from infinite_jax.train import evaluate, evaluation_file, train
from infinite_jax.types import RunState
from sharding import exchange, multihost


def main(argv: Sequence[str] | None = None) -> int:
    arguments = cli.parser("resume", __doc__.splitlines()[0])
    arguments.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    arguments.add_argument(
        "overrides",
        nargs="*",
        default=[],  # without one argparse calls it required
        metavar="key=value",
        help="run.steps, run.tokens, run.*_every, run.keep_*, mesh.*; add=FILE, a YAML list of domains, as under "
        "`domains:`; retire=NAME[,NAME], no longer trained on, still evaluated",
    )
    cli.add_process_arguments(arguments)
    given = arguments.parse_args(argv)
    with RunLock() as lock:
        return _go_on(given, lock)


def _go_on(given: argparse.Namespace, lock: RunLock) -> int:
    run_dir = given.run_dir
    with cli.bad_input():
        asked, overrides = changes.take(given.overrides)
        config = changes.apply(run_folder.load_config(run_dir, overrides), asked)
        set_up_runtime(config)
        cli.join_processes(given)
        lock.take(run_dir)
        if refused := rollback.halted(run_dir):
            if multihost.is_first():
                print(refused, file=sys.stderr)
            multihost.shutdown()
            return cli.HALTED
        screened = gate.screen(config, run_dir)
        if screened.halted:
            gate.write(run_dir / gate.FOLDER / "refused", screened)  # the run's own report stays
            multihost.shutdown()
            return cli.HALTED
        session = open_session(config, screened.domains)
        try:
            fresh, session = session.state, session._replace(state=None)
            abstract = run_folder.abstract(fresh)
            if run_folder.checkpoints(run_dir).steps():
                fresh = None  # one copy at a time: freed before the saved one is read
            session, state, start, new = _continued(session, fresh, abstract, run_dir, asked, screened)
        except BaseException:
            session.close()
            raise
    with session:
        if multihost.is_first():
            print(f"continuing {run_dir} " + ("from its beginning" if start is None else f"after step {start}"))
            for name in asked.retire:
                print(f"retired: {name}, evaluated on")
            if new:
                print(f"added: {', '.join(new)}")
        if new:  # their rates before any training, beside those of the others
            with multihost.shared_fate():
                metrics, _ = evaluate(session, run_dir, start, state)
                if multihost.is_first():
                    record.amend(run_dir, start, session.names, metrics)
        code = train(session, run_dir, state, start)
    multihost.shutdown()
    return code


def _continued(session: Session, fresh: RunState | None, abstract, run_dir: Path, asked: Changes, screened: Screened):
    """Session, state, the step it was saved at, or None, and the names of new domains; the folder is as of that step.

    Nothing is written before every process has read all of it. fresh: the state to begin with where none is saved.
    """
    run_folder.check_data(run_dir, session.data_sha256)
    known, state, start, entry = run_folder.saved_changes(run_dir), fresh, None, None
    if fresh is None:
        start, state, entry = rollback.restore(session, run_dir, abstract, known + changes.entry(asked, 0))
        _check_room(session.config.run, start, state.tokens)
    elif rollback.journal(run_dir):
        raise ValueError(f"{run_dir}: it went back to a checkpoint, and none is left: copy one from a backup")
    if session.config.upgrade.active and start is not None:
        safety.start(session, run_dir, evaluation_file(run_dir, 0))  # what it reads has to be there
    session = session._replace(config=changes.date(session.config, asked, start or 0))
    state, new = changes.grow(session, state)
    state = rollback.returned(session, state, entry, start)
    exchange.barrier("resume:read")  # before the first process changes what the others read
    if multihost.is_first():
        if start is not None:
            grader_watch.check_measured(session, run_dir)
        grader_watch.check_saved(session.config, run_dir, start)
    if entry:
        rollback.settle(run_dir, entry, start)
    if multihost.is_first():
        if not entry:
            record.truncate_after(run_dir, start, run_folder.saved_eval_every(run_dir))
        happened = known + changes.entry(asked, start or 0)
        run_folder.save_config(run_dir, session.config, session.data_sha256, happened)
        gate.write(run_dir / gate.FOLDER, screened)
    return session, state, start, new


def _check_room(run: RunConfig, start: int, tokens: int) -> None:
    if start >= run.steps:
        raise ValueError(f"run.steps={run.steps}: the run is at step {start} already; give a larger one")
    if 0 < run.tokens <= tokens:
        raise ValueError(f"run.tokens={run.tokens}: the run has generated {tokens} already; give more, or 0")


if __name__ == "__main__":
    sys.exit(main())
