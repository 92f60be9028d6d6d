"""Continues a run bit for bit from its newest intact checkpoint.

python -m infinite_jax.resume RUN_DIR [run.steps=N] [key=value ...]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from configs import cli
from infinite_jax import record, run_folder
from infinite_jax.session import open_session, set_up_runtime
from infinite_jax.train import train


def main(argv: Sequence[str] | None = None) -> int:
    arguments = cli.parser("resume", __doc__.splitlines()[0])
    arguments.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    arguments.add_argument(
        "overrides", nargs="*", metavar="key=value", help="run.steps, run.*_every, run.keep_*, mesh.*"
    )
    given = arguments.parse_args(argv)
    run_dir = given.run_dir
    with cli.bad_input():
        config = run_folder.load_config(run_dir, given.overrides)
        set_up_runtime(config)
        session = open_session(config)
        try:
            run_folder.check_data(run_dir, session.data_sha256)
            # one copy of the state at a time: the fresh one is freed before the saved one is read
            session, state = session._replace(state=None), session.state
            abstract, start = run_folder.abstract(state), None
            if run_folder.checkpoints(run_dir).steps():
                state = None
                start, state = run_folder.checkpoints(run_dir).restore(abstract)
                if start >= config.run.steps:
                    raise ValueError(
                        f"run.steps={config.run.steps}: the run is at step {start} already; give a larger one"
                    )
                if 0 < config.run.tokens <= state.tokens:
                    raise ValueError(
                        f"run.tokens={config.run.tokens}: the run has generated {state.tokens} already; give more, or 0"
                    )
            record.truncate_after(run_dir / "metrics.jsonl", start, run_folder.saved_eval_every(run_dir))
            run_folder.save_config(run_dir, config, session.data_sha256)
        except BaseException:
            session.grader.close()
            raise
    with session.grader:
        print(f"continuing {run_dir} " + ("from its beginning" if start is None else f"after step {start}"))
        return train(session, run_dir, state, start)


if __name__ == "__main__":
    sys.exit(main())
