"""The monitor in the loop of an upgrade: what an evaluation says of the prior domains, and what follows from it.

After every evaluation of the run's rhythm (run.eval_every) the monitor (curriculum/monitor.py) compares the model with
M0: with its pass rates in baseline.npz, or, under McNemar's test, with its verdicts on the very prompts of an
evaluation, which are those of step 0. Its new state and what that asks for go into the RunState; numbers go into the
row of the step as safety/*, violations and changes of tier into events.jsonl. Where the run is to go back, that is said
here and done in infinite_jax/rollback.py.

The evaluation that a run has only because it ends there is read and not acted on: a run that goes on from there would
have had none. Under upgrade.watch=false the monitor moves, and nobody does what it asks for.

The first process's numbers count for all: where hosts differ in a last bit, their decisions must not.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from configs.schema import Config
from curriculum import drops, monitor, upgrade
from curriculum.monitor import MonitorState, Transition
from infinite_jax import baseline, heldout
from infinite_jax.heldout import Results
from infinite_jax.session import Session
from infinite_jax.types import RunState
from sharding import exchange

KIND = "safety"  # of events
ROLLBACK, HALT, APPROVAL = "rollback", "halt", "approval"  # kinds of entries of the journal


class Reading(NamedTuple):
    """An evaluation beside M0's."""

    monitor: MonitorState  # after it
    change: Transition
    counted: dict[str, np.ndarray]  # what was compared, f32[D]: passed, prompts, M0_passed, M0_prompts


class Verdict(NamedTuple):
    """What follows from an evaluation."""

    state: RunState
    metrics: dict[str, float | int | None]
    events: Sequence[dict] = ()
    clean: bool = False  # no prior domain has fallen: the step to go back to, so its checkpoint is needed
    back: dict | None = None  # an entry of the journal (rollback.py): the run is to go back


class Watch:
    """Judges evaluations. All processes call it together."""

    def __init__(self, session: Session, before: Results, first: Results):
        """before: M0's baseline. first: its evaluation at step 0, for the paired tests."""
        self.whole, self.config, self.names = session.config, session.config.upgrade, session.names
        self._prior_D = np.array([not domain.new for domain in session.config.domains])
        self._counts, self._first = counts(self.names, before), first

    def read(self, state: RunState, results: Results) -> Verdict:
        """The numbers of an evaluation that nothing follows from."""
        still = self._compare(state.monitor, results, 0)
        numbers = self._metrics(still._replace(change=still.change._replace(tier=state.monitor.tier)))
        return Verdict(state, numbers)

    def after(self, step: int, state: RunState, results: Results) -> Verdict:
        """What follows from the evaluation of `state` at `step`."""
        found = self._compare(state.monitor, results, step)
        moved, change = found.monitor, found.change
        if not self.config.watch:
            moved = moved._replace(attempt=state.monitor.attempt)  # it is part of the random streams
        metrics = self._metrics(found) | {
            "safety/halted": int(moved.halted),
            "safety/attempt": int(moved.attempt),
        }
        metrics |= {f"safety/boost/{name}": float(boost) for name, boost in zip(self.names, moved.boost)}
        back = None
        if self.config.watch and change.rollback:
            back = {
                "kind": HALT if change.halt else ROLLBACK,
                "attempt": int(moved.attempt),
                "at": step,
                "to": int(moved.last_good_step),
                "because": self._because(change),
                "numbers": self._numbers(found),
                "monitor": plain(moved),
            }
        state = applied(self.whole, state._replace(monitor=moved))
        clean = self.config.watch and int(moved.last_good_step) == step
        return Verdict(state, metrics, self._events(found), clean, back)

    def _compare(self, state: MonitorState, results: Results, step: int) -> Reading:
        (K_D, N_D), (k_D, n_D), pairs = self._counts, counts(self.names, results), ()
        if self.config.monitor.test != "unpaired":
            n_D, *pairs = disagreements(self.names, self._first, results)
        made = _update(self.config.monitor, state, K_D, N_D, k_D, n_D, self._prior_D, np.int32(step), *pairs)
        moved, change = exchange.from_first([plain(part) for part in jax.device_get(made)])
        counted = {"passed": k_D, "prompts": n_D, "M0_passed": K_D, "M0_prompts": N_D}
        change = Transition(**{name: np.asarray(value) for name, value in change.items()})
        return Reading(unplain(state, moved), change, counted)

    def _metrics(self, reading: Reading) -> dict[str, float | int | None]:
        change, known_D = reading.change, (reading.counted["prompts"] > 0) & (reading.counted["M0_prompts"] > 0)
        found = {"safety/tier": int(change.tier), "safety/threshold": float(change.threshold)}
        for d, name in enumerate(self.names):
            found[f"safety/drop/{name}"] = float(change.drop[d]) if known_D[d] else None
            found[f"safety/z/{name}"] = float(change.z[d]) if known_D[d] else None
            found[f"safety/violation/{name}"] = int(change.violation[d])
        return found

    def _numbers(self, reading: Reading) -> dict:
        """What caused a transition: of the evaluation, and of each domain that has fallen."""
        change, fallen = reading.change, {}
        for d in np.flatnonzero(change.violation):
            of_test = {key: float(getattr(change, key)[d]) for key in ("drop", "error", "z")}
            counted = {key: float(value_D[d]) for key, value_D in reading.counted.items()}
            fallen[self.names[d]] = of_test | {"hard": bool(change.hard[d])} | counted
        tiers = {"tier_before": int(change.tier_before), "tier": int(change.tier)}
        return tiers | {"test": self.config.monitor.test, "threshold": float(change.threshold), "fallen": fallen}

    def _because(self, change: Transition) -> str:
        return ", ".join(
            f"{self.names[d]} fell by {change.drop[d]:.3f} (z {change.z[d]:.2f} > {change.threshold:.2f})"
            for d in np.flatnonzero(change.violation)
        )

    def _events(self, reading: Reading) -> list[dict]:
        change, numbers = reading.change, self._numbers(reading)
        events = [
            {"kind": KIND, "domain": name, "what": "violation", "threshold": numbers["threshold"]} | of_domain
            for name, of_domain in numbers["fallen"].items()
        ]
        if change.tier != change.tier_before:
            because = self._because(change) or f"{self.config.monitor.recovery} evaluations without a violation"
            moved = {key: numbers[key] for key in ("tier_before", "tier")}
            events.append({"kind": KIND, "what": "tier"} | moved | {"because": because})
        return events if self.config.watch else [event | {"watch": False} for event in events]


def start(session: Session, run_dir: Path, first: Path | Results) -> Watch | None:
    """The watch of an upgrade; None where the run is none. first: M0's evaluation at step 0, or its file.

    Raises ValueError, one line, where the numbers of M0 are missing or damaged.
    """
    if not session.config.upgrade.active:
        return None
    if isinstance(first, Path):
        paired = session.config.upgrade.monitor.test != "unpaired"
        first = baseline.load(session.config, first) if paired else {}
    return Watch(session, baseline.read(session.config, run_dir), first)


def applied(config: Config, state: RunState) -> RunState:
    """`state` with what its monitor asks for in the curriculum's leaves."""
    if state.monitor is None:
        return state
    asked, curriculum = upgrade.effects(config.upgrade, state.monitor), state.curriculum
    boost, share = exchange.replicated(curriculum.step.sharding.mesh, (asked.boost, asked.new_share))
    return state._replace(curriculum=curriculum._replace(boost=boost, new_share=share))


def held(before: RunState, state: RunState) -> tuple[int, ...]:
    """Steps whose checkpoints a save of `state` may not delete: the last good one, and the one that it follows."""
    return () if state.monitor is None else tuple(int(s.monitor.last_good_step) for s in (before, state))


def judge(watch: Watch | None, step: int, state: RunState, results: Results, every: int) -> Verdict:
    """What follows from the evaluation at `step`; those outside the rhythm `every`, and the first, are only read."""
    if watch is None:
        return Verdict(state, {})
    return watch.after(step, state, results) if step and step % every == 0 else watch.read(state, results)


def acts(config: Config) -> bool:
    """Whether what the monitor asks for is done."""
    return config.upgrade.active and config.upgrade.watch


def counts(names: list[str], results: Results) -> tuple[np.ndarray, np.ndarray]:
    """(passes, prompts) f32[D] of the greedy replies that have a grade; 0 for a domain without results."""
    passed = [heldout.passed(results[name].greedy_N) if name in results else np.zeros(0) for name in names]
    sums = [(np.nansum(x), np.sum(~np.isnan(x))) for x in passed]
    return tuple(np.array(sums, np.float32).T)


def disagreements(names: list[str], first: Results, results: Results) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n, lost, gained) [D]: of the same prompts, see drops.disagreements."""
    shared = [(d, name) for d, name in enumerate(names) if name in first and name in results]
    before, now = ([heldout.passed(side[name].greedy_N) for _, name in shared] for side in (first, results))
    domain_P = np.repeat([d for d, _ in shared], [len(x) for x in before])
    sides = (np.concatenate(side)[:, None].astype(np.float32) for side in (before, now))
    return jax.device_get(drops.disagreements(domain_P, *sides, len(names)))


def plain(values: NamedTuple) -> dict[str, Any]:
    """Named arrays in JSON types; f32 come back as they were."""
    return {name: np.asarray(value).tolist() for name, value in values._asdict().items()}


def unplain(like: MonitorState, values: dict[str, Any]) -> MonitorState:
    """The state that `plain` was given, with the dtypes of `like`."""
    return MonitorState(**{name: np.array(values[name], getattr(like, name).dtype) for name in like._fields})


@functools.partial(jax.jit, static_argnums=0)
def _update(config, *arguments) -> tuple[MonitorState, Transition]:
    return monitor.update(config, *arguments)
