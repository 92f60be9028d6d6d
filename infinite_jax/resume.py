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
    with cli.bad_input():
        config = run_folder.load_config(given.run_dir, given.overrides)
        set_up_runtime(config)
        session = open_session(config)
        start, state = run_folder.restore(given.run_dir, session.state, None)
        if start >= config.run.steps:
            session.grader.close()
            raise ValueError(
                f"run.steps={config.run.steps}: the run is at step {start} already; give a larger run.steps"
            )
        run_folder.save_config(given.run_dir, config)
        record.truncate_after(given.run_dir / "metrics.jsonl", start, config.run.eval_every)
    with session.grader:
        print(f"continuing {given.run_dir} after step {start}")
        return train(session, given.run_dir, state, after=start)


if __name__ == "__main__":
    sys.exit(main())
