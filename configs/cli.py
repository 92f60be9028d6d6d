"""The command line of every verb: Hydra's compose API, one argparse front end, errors of one line.

Hydra's own @main is not used: it takes no positional argument, prints several lines an error and creates folders.

Exit codes: 0 done, 1 failed, 2 bad input, 3 halted by a gate, 75 preempted (saved).
"""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from configs import faults, idle, schema
from sharding import multihost

DONE, FAILED, BAD_INPUT, HALTED, PREEMPTED = 0, 1, 2, 3, 75
USERS = (ValueError, OSError, ModuleNotFoundError, YAMLError)  # errors that the user can mend
_OF_HOME = re.compile(r"""^([^=]+=["']?)~(?=/)""")  # no shell expands it behind a =, and Hydra knows no ~


class _Parser(argparse.ArgumentParser):
    def parse_args(self, args=None, namespace=None):
        """Options may stand among the key=value arguments, which plain argparse refuses."""
        return self.parse_intermixed_args(args, namespace)


def parser(verb: str, description: str) -> argparse.ArgumentParser:
    """A parser for `python -m infinite_jax.<verb>`; the verb adds its own positional arguments."""
    return _Parser(
        prog=f"python -m infinite_jax.{verb}",
        description=description,
        epilog="key=value overrides the configuration (configs/config.yaml lists the keys); group=name picks a file of "
        "configs/<group>/, such as curriculum=uniform.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_config_arguments(arguments: argparse.ArgumentParser) -> None:
    arguments.add_argument("--config-name", default="config", metavar="NAME", help="base file: config, grpo, or yours")
    arguments.add_argument("--config-dir", metavar="DIR", help="folder of your own YAML files")
    arguments.add_argument("overrides", nargs="*", metavar="key=value")


def refuse_config_arguments(given: argparse.Namespace, because: str) -> None:
    """Raises ValueError, one line, where one of the options above names a file that would not be read."""
    for option, value, default in (("name", given.config_name, "config"), ("dir", given.config_dir, None)):
        if value != default:
            raise ValueError(f"--config-{option} {value}: {because}: leave it out")


def add_process_arguments(arguments: argparse.ArgumentParser) -> None:
    group = arguments.add_argument_group(
        "several processes", "SLURM, TPU slices and Kubernetes need none of these: docs/pods.md"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0; JAX_COORDINATOR_ADDRESS")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are; JAX_NUM_PROCESSES")
    group.add_argument("--process", type=int, metavar="I", help="this one, 0 to N - 1; JAX_PROCESS_ID")


def join_processes(given: argparse.Namespace) -> None:
    """Joins the others, if there are any; before the first device is touched. Raises ValueError, one line."""
    multihost.initialize(multihost.Given(given.coordinator, given.processes, given.process))


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """Within it, what the user gave is read and checked: a ValueError or missing file is one line and exit code 2.

    Of several processes one prints the line, and all end.
    """
    try:
        with multihost.shared_fate(but=USERS):
            yield
    except USERS as error:
        line = " ".join(str(error).split())
        multihost.end(BAD_INPUT, line)
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from error


def compose_config(
    name: str, folder: str | None, overrides: Sequence[str], typed: Sequence[str] | None = None
) -> schema.Config:
    """Composes YAML and overrides into a Config. Raises ValueError, one line, on anything that does not fit.

    typed: those overrides that this configuration alone has to read; None: all.
    """
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"--config-dir {folder}: no such folder")
    plain, listed = _listed(overrides)
    GlobalHydra.instance().clear()
    # Hydra looks for NAME where it is initialised only; the other place adds files of groups, of names of their own
    if folder is not None and (Path(folder) / f"{name.removesuffix('.yaml')}.yaml").is_file():
        context = initialize_config_dir(str(Path(folder).absolute()), version_base="1.3")
        search = ["hydra.searchpath=[pkg://configs]"]
    else:
        context = initialize_config_module("configs", version_base="1.3")
        search = [f"hydra.searchpath=['file://{Path(folder).absolute()}']"] if folder is not None else []
    try:
        with context:
            composed = compose(name.removesuffix(".yaml"), overrides=[*plain, *search])
            data = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ValueError(faults.one_line(error, overrides, folder)) from error
    except RecursionError as error:
        raise ValueError(f"--config-dir {folder}: its config.yaml extends itself; give it another name") from error
    if not isinstance(data, dict) or not data.keys() & {"algorithm", "domains"}:
        raise ValueError(f"--config-name {name}: holds no configuration; begin it with `defaults: [config, _self_]`")
    config = schema.build(schema.Config, data | listed)
    idle.check([config], overrides if typed is None else typed)
    return config


def _listed(overrides: Sequence[str]) -> tuple[list[str], dict[str, list]]:
    """(what Hydra composes, {"domains": [...]} or {}): to Hydra `domains` names a file, and it knows no list of them.

    Raises ValueError, one line, on what is no key=value, on a group that is set to no name, and on what else is said
    of the domains beside a list of them.
    """
    plain, listed, parser, of_domains = [], {}, OverridesParser.create(), []
    for text in overrides:
        if "=" not in text:
            raise ValueError(f"argument {text!r}: expected key=value, such as run.steps=100")
        text = _OF_HOME.sub(lambda found: found[1] + os.path.expanduser("~"), text)
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            key, _, value = text.partition("=")
            raise ValueError(
                f"argument {text!r}: {str(error).splitlines()[0]}; a value with special characters stands in quotes of "
                f"its own, '{key}=\"{value}\"'"
            ) from error
        key, value = override.key_or_group, override.value()
        if key == "domains" or key.startswith("domains."):
            of_domains.append(text)
        if key == "domains" and isinstance(value, list) and not any(map(_is_text, value)):
            listed = {"domains": value}
        else:
            faults.check_group(override)
            plain.append(text)
    if listed and len(of_domains) > 1:
        raise ValueError(
            f"{' '.join(of_domains)}: a list is all of the domains: write the change into it, or leave it out"
        )
    return plain, listed


def _is_text(value: object) -> bool:
    return isinstance(value, str)
