"""Teaches a model M0 new domains and watches over those it has: a training run held to M0, docs/upgrade.md.

python -m infinite_jax.upgrade model.path=M0 [--config-name NAME] [--config-dir DIR] [key=value ...]
python -m infinite_jax.upgrade --approve RUN_DIR --by NAME --why TEXT        lets a run go on that was halted
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from configs import cli
from infinite_jax import rollback, train


def main(argv: Sequence[str] | None = None) -> int:
    arguments = cli.parser("upgrade", __doc__.splitlines()[0])
    cli.add_config_arguments(arguments)
    cli.add_process_arguments(arguments)
    review = arguments.add_argument_group("a run that was halted")
    review.add_argument("--approve", type=Path, metavar="RUN_DIR", help="lets it go on, once a person has looked at it")
    review.add_argument("--by", default="", metavar="NAME", help="who has")
    review.add_argument("--why", default="", metavar="TEXT", help="why it may go on")
    given = arguments.parse_args(argv)
    with cli.bad_input():
        if given.approve and given.overrides:
            raise ValueError(f"--approve: takes no key=value; leave out {' '.join(given.overrides)}")
        if not given.approve and (given.by or given.why):
            raise ValueError("--by, --why: of an approval: name the halted run with --approve RUN_DIR")
        if given.approve:
            print(rollback.approve(given.approve, given.by, given.why))
            return cli.DONE
    given.overrides = [*given.overrides, "upgrade.active=true"]
    return train.begin(given)


if __name__ == "__main__":
    sys.exit(main())
