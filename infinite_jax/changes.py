"""Domains that come and go where a run is continued: resume RUN_DIR add=more.yaml retire=NAME.

An added domain stands after all others and arrives at the step that the run goes on from, or later if it says so; a
retired one is no longer trained on from there, but still evaluated. What the run knows of every other domain (its
leaves in the triage state, its position in its data, the keys of draws, its evaluations) stays bit for bit as it was,
and so do the parameters and the optimizer's moments. Shares change, being shares.

config.yaml then holds the longer list and, under `changes`, what changed at which step. Domains are only ever appended,
so a checkpoint from before a change holds the first of today's domains: it is restored as it is and grown, whether the
run was killed before its next save or has fallen back to an older step.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import yaml
from jax.sharding import NamedSharding, PartitionSpec

from configs import schema
from configs.schema import Config
from curriculum import domains, triage
from curriculum.domains import DomainConfig
from curriculum.triage import Roster
from infinite_jax.checkpoint import Checkpointer, TreeMismatch
from infinite_jax.roster import members
from infinite_jax.session import Session
from infinite_jax.types import RunState
from sharding import exchange


class Changes(NamedTuple):
    add: tuple[DomainConfig, ...]
    retire: tuple[str, ...]  # names


def take(overrides: Sequence[str]) -> tuple[Changes, list[str]]:
    """Splits add=FILE and retire=NAME[,NAME] off resume's arguments; either may be given more than once.

    FILE is a YAML list of domains, or holds one under `domains:`. Raises ValueError or FileNotFoundError, one line.
    """
    add, retire, rest = [], [], []
    for item in overrides:
        key, _, value = item.partition("=")
        if key == "add":
            add += _entries(Path(value))
        elif key == "retire":
            retire += [name.strip() for name in value.split(",")]
        elif key == "step":
            raise ValueError(
                f"{item}: a run goes on from its newest intact checkpoint: for an earlier one copy the run's folder, "
                "delete the later folders of the copy's checkpoints/ and resume the copy"
            )
        else:
            rest.append(item)
    return Changes(tuple(add), tuple(retire)), rest


def _entries(path: Path) -> tuple[DomainConfig, ...]:
    if not path.is_file():
        raise FileNotFoundError(f"add={path}: no such file; expected a YAML list of domains")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"add={path}: not YAML: {error}") from error
    if isinstance(data, dict) and data.keys() == {"domains"}:
        data = data["domains"]
    if not isinstance(data, list) or not data:
        raise ValueError(f"add={path}: expected a list of domains, - {{name: ..., train: ..., test: ...}}")
    return schema.build(tuple[DomainConfig, ...], data, f"add={path}: domains")


def apply(config: Config, changes: Changes) -> Config:
    """`config` with the added domains at its end. Raises ValueError, one line, on a name taken or not known."""
    known = {domain.name: domain for domain in config.domains}
    if changes.add and config.upgrade.active:
        raise ValueError(
            "add: M0 was measured on an upgrade's domains before it began: export this run and upgrade that model"
        )
    for domain in changes.add:
        if domain.name in known:
            raise ValueError(
                f"add: the run has a domain {domain.name!r} already: give the new one another name, or leave it out "
                "if it was added before"
            )
        known[domain.name] = domain
    for name in changes.retire:
        if name not in known:
            trained = ", ".join(
                domain.name for domain in config.domains if not domain.eval_only and domain.retires is None
            )
            raise ValueError(f"retire={name}: the run has no such domain; it trains on {trained}")
        if known[name].eval_only:
            raise ValueError(f"retire={name}: it is eval_only, so it is not trained on: leave it out")
    added = schema.located(dataclasses.replace(config, domains=changes.add)).domains
    return dataclasses.replace(config, domains=(*config.domains, *added))


def date(config: Config, changes: Changes, step: int) -> Config:
    """`config`, the added domains being in it, with the changes dated `step`, the first that is still to come.

    Raises ValueError, one line, where a domain has retired before or none would be left to train on.
    """
    added, dated = {domain.name for domain in changes.add}, []
    for domain in config.domains:
        if domain.name in added:
            domain = dataclasses.replace(domain, arrives=max(domain.arrives, step))
            if domain.retires is not None and domain.retires <= domain.arrives:
                raise ValueError(
                    f"add: {domain.name} retires at {domain.retires}, and the run is at step {step} already"
                )
        if domain.name in changes.retire:
            if domain.retires is not None and domain.retires <= step:
                raise ValueError(f"retire={domain.name}: it retired at step {domain.retires} already: leave it out")
            domain = dataclasses.replace(domain, retires=max(domain.arrives, step))
        dated.append(domain)
    gap = domains.first_gap(dated)
    if gap is not None and gap < config.run.steps:
        raise ValueError(
            f"retire={','.join(changes.retire)}: no domain is left to train on at step {gap}: add one, or keep one"
        )
    return dataclasses.replace(config, domains=tuple(dated))


def entry(changes: Changes, step: int) -> list[dict]:
    """What config.yaml records under `changes`; empty where nothing changes."""
    if not changes.add and not changes.retire:
        return []
    return [{"step": step, "add": [domain.name for domain in changes.add], "retire": list(changes.retire)}]


def restore(
    checkpoints: Checkpointer, session: Session, state: RunState, record: Sequence[dict], step: int | None = None
) -> tuple[int, RunState]:
    """Like Checkpointer.restore for the abstract `state`, whose checkpoint may be older than changes on record."""
    number, error = len(session.names), None
    numbers = [number] + [number := number - len(change["add"]) for change in reversed(record) if change["add"]]
    for number in numbers:
        try:
            return checkpoints.restore(_of_first(session, state, number), step)
        except TreeMismatch as mismatch:
            error = error or mismatch
    raise error


def _of_first(session: Session, state: RunState, number: int) -> RunState:
    """The abstract `state` as it was with the first `number` domains only."""
    policy, roster = session.trainer.curriculum, _roster(session)
    first = jax.eval_shape(policy.init, session.config.run.seed, jax.tree.map(lambda leaf: leaf[:number], roster))

    def placed(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_replicated(session))

    return state._replace(curriculum=jax.tree.map(placed, first), position=session.trainer.stream.start(number))


def grow(session: Session, state: RunState) -> tuple[RunState, list[str]]:
    """`state` for all domains of the session, and the names of those it lacked, which are appended.

    All retire when the configuration says. Otherwise, leaves of the others are bit for bit those of `state`.
    """
    held, roster = state.curriculum.retires.shape[0], _roster(session)
    curriculum, position = state.curriculum, state.position
    if held < len(session.names):
        new = jax.tree.map(lambda leaf: leaf[held:], roster)
        curriculum = triage.grow(curriculum, session.config.curriculum, new)
        position = session.trainer.stream.grow(position)
    curriculum = exchange.replicated(session.mesh, curriculum._replace(retires=roster.retires))
    return state._replace(curriculum=curriculum, position=position), session.names[held:]


def _roster(session: Session) -> Roster:
    return members(session.config, session.trainer.stream.sets.size_D)


def _replicated(session: Session) -> NamedSharding:
    return NamedSharding(session.mesh, PartitionSpec())
