"""Continues a run bit for bit from its newest intact checkpoint; domains may be added to it and retired.

python -m infinite_jax.resume RUN_DIR [run.steps=N] [key=value ...] [add=more.yaml] [retire=NAME]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from configs import cli
from infinite_jax import changes, gate, grader_watch, record, rollback, run_folder, safety
from infinite_jax.session import open_session, set_up_runtime
from infinite_jax.train import evaluate, evaluation_file, train
from sharding import exchange, multihost


def main(argv: Sequence[str] | None = None) -> int:
    arguments = cli.parser("resume", __doc__.splitlines()[0])
    arguments.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    arguments.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="run.steps, run.tokens, run.*_every, run.keep_*, mesh.*; add=FILE, a YAML list of domains, as under "
        "`domains:`; retire=NAME[,NAME], no longer trained on, still evaluated",
    )
    cli.add_process_arguments(arguments)
    given = arguments.parse_args(argv)
    run_dir = given.run_dir
    with cli.bad_input():
        asked, overrides = changes.take(given.overrides)
        config = changes.apply(run_folder.load_config(run_dir, overrides), asked)
        set_up_runtime(config)
        cli.join_processes(given)
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
            run_folder.check_data(run_dir, session.data_sha256)
            # one copy of the state at a time: the fresh one is freed before the saved one is read
            session, state = session._replace(state=None), session.state
            abstract, start, entry = run_folder.abstract(state), None, None
            known = run_folder.saved_changes(run_dir)
            if not run_folder.checkpoints(run_dir).steps() and rollback.journal(run_dir):
                raise ValueError(f"{run_dir}: it went back to a checkpoint, and none is left: copy one from a backup")
            if run_folder.checkpoints(run_dir).steps():
                state = None
                start, state, entry = rollback.restore(session, run_dir, abstract, known + changes.entry(asked, 0))
                if start >= config.run.steps:
                    raise ValueError(
                        f"run.steps={config.run.steps}: the run is at step {start} already; give a larger one"
                    )
                if 0 < config.run.tokens <= state.tokens:
                    raise ValueError(
                        f"run.tokens={config.run.tokens}: the run has generated {state.tokens} already; give more, or 0"
                    )
            if config.upgrade.active and start is not None:
                safety.start(session, run_dir, evaluation_file(run_dir, 0))  # what it reads has to be there
            config = changes.date(config, asked, start or 0)
            session = session._replace(config=config)
            state, new = changes.grow(session, state)
            state = rollback.returned(session, state, entry, start)
            exchange.barrier("resume:read")  # before the first process changes what the others read
            if multihost.is_first():
                grader_watch.check_saved(config, run_dir, start)
            if entry:
                rollback.settle(run_dir, entry, start)
            if multihost.is_first():
                if not entry:
                    record.truncate_after(run_dir, start, run_folder.saved_eval_every(run_dir))
                run_folder.save_config(run_dir, config, session.data_sha256, known + changes.entry(asked, start or 0))
                gate.write(run_dir / gate.FOLDER, screened)
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


if __name__ == "__main__":
    sys.exit(main())
