"""Held-out pass rates of a run's checkpoint or of any model, with 95 % intervals.

python -m infinite_jax.evaluate RUN_DIR [step=best|N] [eval.*=...] [mesh.*=...]
python -m infinite_jax.evaluate model.path=DIR [--config-name NAME] [--config-dir DIR] [key=value ...]
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from configs import cli
from infinite_jax import run_folder
from infinite_jax.progress import results_table
from infinite_jax.session import open_session, set_up_runtime
from infinite_jax.types import RunState
from sharding import multihost


def main(argv: Sequence[str] | None = None) -> int:
    arguments = cli.parser("evaluate", __doc__)
    cli.add_config_arguments(arguments)
    cli.add_process_arguments(arguments)
    given = arguments.parse_args(argv)
    with cli.bad_input():
        if given.overrides and ("=" not in given.overrides[0] or Path(given.overrides[0]).is_dir()):
            step, overrides = run_folder.take_step(given.overrides[1:])
            run_dir = Path(given.overrides[0])
            cli.refuse_config_arguments(given, f"{run_dir} has a configuration of its own")
            config = run_folder.load_config(run_dir, overrides, also_free=("eval",))
        else:
            run_dir, config = None, cli.compose_config(given.config_name, given.config_dir, given.overrides)
        config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, canary=False))  # not shown here
        set_up_runtime(config)
        cli.join_processes(given)
        session = open_session(config)
        state = session.state
        if run_dir is not None:
            # the policy alone: the rest depends on how many domains the run had at that step
            trained = RunState(run_folder.abstract(state.train), None, None, None)
            number, state = run_folder.checkpoints(run_dir).restore(trained, step)
            say(f"{run_dir}, step {number}")
    with session, multihost.shared_fate():
        results = session.evaluator.run(state.train.params)
        say(results_table(results))
    multihost.shutdown()
    return cli.DONE


def say(text: str) -> None:
    """Once, whatever the number of processes."""
    if multihost.is_first():
        print(text)


if __name__ == "__main__":
    sys.exit(main())
