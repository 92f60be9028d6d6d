"""Whether grades mean a comparable thing: one frozen policy's held-out replies under every domain's rubric.

python -m infinite_jax.calibrate RUN_DIR [step=best|N] [eval.*=...] [mesh.*=...]

Default: the model that the run began from, which every checkpoint shares. Writes RUN_DIR/calibration.json, which
`python -m infinite_jax.report RUN_DIR` shows. D domains are D x D gradings: with a judge or slow tests
set eval.prompts=16.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from configs import cli
from infinite_jax import atomic, heldout, run_folder
from infinite_jax.page.calibration import unlike
from infinite_jax.page.run import CALIBRATION
from infinite_jax.session import Session, open_session, set_up_runtime
from infinite_jax.types import RunState
from rubric import calibration
from rubric.evaluator import Grades


def main(argv: Sequence[str] | None = None) -> int:
    arguments = cli.parser("calibrate", __doc__)
    arguments.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    arguments.add_argument("overrides", nargs="*", metavar="step=best|N", help="or eval.*=..., mesh.*=...")
    given = arguments.parse_args(argv)
    with cli.bad_input():
        step, overrides = run_folder.take_step(given.overrides)
        config = run_folder.load_config(given.run_dir, overrides, also_free=("eval",))
        config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, canary=False, samples=1))
        set_up_runtime(config)
        session = open_session(config)
        number, params = 0, session.state.train.params
        if step is not None:
            trained = RunState(run_folder.abstract(session.state.train), None, None, None)
            number, state = run_folder.checkpoints(given.run_dir).restore(trained, step)
            params = state.train.params
    with session:
        found = measure(session, session.evaluator.run(params))
    path = given.run_dir / CALIBRATION
    atomic.replace(path, json.dumps({"step": number} | found, allow_nan=False))
    print("\n".join([*unlike(found), f"step {number}: {path}"]))
    return cli.DONE


def measure(session: Session, results: heldout.Results) -> dict:
    """Plain data, None for NaN: `table` {domain: calibration.Spread}, and the matrix, replies of a row's domain under
    the rubric of a column's: `graded`, `mean` and `passed`, of `asked` replies."""
    samples = [calibration.Sample(results[name].rows, results[name].replies) for name in session.names]
    matrix = calibration.cross(session.grader, session.names, samples)
    table = {}
    for name in session.names:
        grade_N = results[name].greedy_N
        spread = calibration.spread(name, Grades(grade_N, np.zeros_like(grade_N), ~np.isnan(grade_N)))
        table[name] = _plain({key: value for key, value in spread._asdict().items() if key != "domain"})
    parts = {"asked": matrix.asked_D, "graded": matrix.n_DD, "mean": matrix.mean_DD, "passed": matrix.pass_DD}
    return {"names": list(session.names), "table": table} | {key: _plain(x.tolist()) for key, x in parts.items()}


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and math.isnan(value) else value


if __name__ == "__main__":
    sys.exit(main())
