"""Teaches a model M0 new domains and watches over those it has: a training run held to M0, docs/upgrade.md.

python -m infinite_jax.upgrade model.path=M0 [--config-name NAME] [--config-dir DIR] [key=value ...]
"""

import sys
from collections.abc import Sequence

from configs import cli
from infinite_jax import train


def main(argv: Sequence[str] | None = None) -> int:
    arguments = cli.parser("upgrade", __doc__.splitlines()[0])
    cli.add_config_arguments(arguments)
    cli.add_process_arguments(arguments)
    given = arguments.parse_args(argv)
    given.overrides += ["upgrade.active=true"]
    return train.begin(given)


if __name__ == "__main__":
    sys.exit(main())
