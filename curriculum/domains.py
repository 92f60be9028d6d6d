"""Domains: their configuration, their rows, and the order in which a run goes through the rows.

Rows come from the sources of sources.py. The order is Grain's: a shuffled MapDataset with random access, so a run's
position in its data is one number a set of rows, and no iterator has to be saved. A domain has one set of training
rows, or one a level of difficulty where curriculum.difficulty is adaptive and its generator is given a range of levels.
With fixed difficulty the levels of a range are one set, mixed evenly. Test rows are one fixed set in either case.

A domain takes part in training from step `arrives` on and up to the one before `retires`; it is evaluated throughout.

    python -m curriculum.domains SOURCE [--head N]      prints the rows of a source as JSON lines
"""

import argparse
import itertools
import json
import os
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import grain

from curriculum import forms
from curriculum.generators import Row
from curriculum.sources import GENERATORS, levels, made_for, maker, read, read_levels

LAST_STEP = 2**31 - 2  # steps are i32, and the largest stands for "never"


@dataclass(frozen=True)
class DomainConfig:
    name: str  # unique; the <domain> of metrics
    train: str | None = None  # source of training rows; not needed, and not read, where eval_only
    test: str | None = None  # source of held-out rows
    environment: str = "eq"  # what grades a reply: a grader of rubric/
    rubric: str | None = None  # None = the environment's own
    weight: float = 1.0  # above 0; multiplies the domain's share
    new: bool = False  # in an upgrade: to be learned, not to be kept
    kl: float = 1.0  # factor on algorithm.kl_coef for this domain's rows
    eval_only: bool = False  # no training prompts, share 0
    arrives: int = 0  # first step that may train on it
    retires: int | None = None  # first step that no longer does; None = never
    description: str | None = None  # one sentence: what its prompts ask; read by rehearsal alone, as is `form`
    form: str | None = None  # pattern of its prompts (forms.py), where there is one


class Domain(NamedTuple):
    name: str
    config: DomainConfig
    train_levels: dict[int, list[Row]]  # by level of difficulty, easiest first; one level unless they are kept apart
    test_rows: list[Row]

    @property
    def train_rows(self) -> list[Row]:
        """Of all levels; empty where eval_only."""
        return list(itertools.chain.from_iterable(self.train_levels.values()))

    @property
    def makers(self) -> tuple[str | None, str | None]:
        """The generators of training and test rows, None where they come from elsewhere."""
        return maker(self.config.train), maker(self.config.test)


def check(configs: Sequence[DomainConfig]) -> None:
    """Raises ValueError, one line that begins with the key, on values that no run can use. Reads nothing."""
    if not configs:
        raise ValueError("domains=[]: a run needs at least one domain: {name: ..., train: ..., test: ...}")
    first: dict[str, int] = {}
    for i, config in enumerate(configs):
        where = f"domains[{i}]"
        if not config.name:
            raise ValueError(f"{where}.name={config.name!r}: metrics carry the name, give one")
        if first.setdefault(config.name, i) != i:
            raise ValueError(f"{where}.name={config.name!r}: domains[{first[config.name]}] has this name, rename one")
        if not config.train and not config.eval_only:
            raise ValueError(f"{where}.train={config.train!r}: give a source of training rows, or set eval_only: true")
        if not config.test:
            raise ValueError(f"{where}.test={config.test!r}: give a source of held-out rows")
        if config.form is not None:
            try:
                forms.check(config.form)
            except ValueError as error:
                raise ValueError(f"{where}.form={error}") from error
        if not 0 < config.weight < float("inf"):
            raise ValueError(f"{where}.weight={config.weight}: must be above 0; for share 0 set eval_only: true")
        if not 0 <= config.arrives <= LAST_STEP:
            raise ValueError(f"{where}.arrives={config.arrives}: must be a step, 0 or more and at most {LAST_STEP}")
        if config.retires is not None and not config.arrives <= config.retires <= LAST_STEP:
            raise ValueError(
                f"{where}.retires={config.retires}: must be a step from arrives={config.arrives} on, or left out"
            )
        if not 0 <= config.kl < float("inf"):
            raise ValueError(f"{where}.kl={config.kl}: must be a factor of at least 0 (1 = algorithm.kl_coef as it is)")
        _check_environment(config, where)


def _check_environment(config: DomainConfig, where: str) -> None:
    """Generated rows under the default grader, where theirs is another: nothing would fail, and every grade be 1."""
    if config.rubric is not None or config.environment != "eq":
        return
    for source in (config.train, config.test):
        grader = made_for(source) if source else None
        if grader not in (None, "eq"):
            raise ValueError(
                f"{where}.environment={config.environment!r}: the rows of {source} are made for {grader}, set "
                f"environment: {grader}"
            )


def level_ends(config: DomainConfig) -> tuple[int, int]:
    """Easiest and hardest level of the training rows; both the same where there is one. Reads nothing."""
    return (1, 1) if config.eval_only else levels(config.train)


def first_gap(configs: Sequence[DomainConfig]) -> int | None:
    """The first step at which no domain can be trained on, None where there is none. Checked configurations only."""
    step = 0
    for config in sorted((config for config in configs if not config.eval_only), key=lambda config: config.arrives):
        if config.arrives > step:
            break
        if config.retires is None:
            return None
        step = max(step, config.retires)
    return step


def load(
    configs: Sequence[DomainConfig], base: str | os.PathLike | None = None, adaptive: bool = False
) -> list[Domain]:
    """Checks and reads all domains; relative paths are taken from `base` (default: the working directory).

    `adaptive` keeps the levels of a range apart. Raises ValueError or FileNotFoundError, one line: the key that is
    wrong, or file:line of a row.
    """
    check(configs)
    domains = []
    for config in configs:
        if config.eval_only:
            train = {1: []}
        else:
            train = read_levels(config.train, base) if adaptive else {levels(config.train)[0]: read(config.train, base)}
        domains.append(Domain(config.name, config, train, read(config.test, base)))
    return domains


def shuffled(rows: Sequence[Row], seed: int, name: str) -> grain.MapDataset:
    """The rows of domain `name` in endless shuffled order, any position of which can be read: shuffled(...)[i].

    Position i lies in epoch i // len(rows), and every epoch is a permutation of its own. What stands at i depends on
    rows, seed, name and i alone. Raises ValueError when there are no rows.
    """
    if not rows:
        raise ValueError(f"domain {name!r} has no rows to go through: give it a source of training rows")
    domain_seed = zlib.crc32(f"{seed} {name}".encode())  # not hash(), which differs from process to process
    return grain.MapDataset.source(rows).seed(domain_seed).shuffle().repeat()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m curriculum.domains",
        description="Prints the rows of a source as JSON lines: checks a file, shows or writes out a generated domain.",
        epilog=f"gen:NAME[,difficulty=1 or 1..4][,split=train|test][,size=N][,seed=0], NAME one of "
        f"{', '.join(GENERATORS)}",
    )
    parser.add_argument(
        "source",
        help="file.json, .jsonl, .csv or .parquet; split@hub-name; gen:NAME,...; gym:NAME,...; suite:NAME:PATH",
    )
    parser.add_argument("--head", type=int, metavar="N", help="only the first N rows")
    arguments = parser.parse_args()
    try:
        rows = read(arguments.source)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    try:
        for row in rows[: arguments.head]:
            print(json.dumps(row, ensure_ascii=False))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has what it wanted; nothing may be flushed to it at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
