"""Environments of a batch: the turns of many conversations at once, each with what went wrong, if anything did.

A row whose environment raised, hung or is down is invalid: that says nothing about the policy. Calls run in threads,
because environments wait (for a service, a sandbox, a process of their own) more than they compute; those that offer
`interact_all` get all their rows in one call.
"""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from rubric.environments import registry
from rubric.environments.protocol import (
    Environment,
    Message,
    Unavailable,
    checked_grade,
    checked_turns,
    of_row,
    shown_tools,
)
from rubric.grading import Result, reason_of

THREADS = 16
QUIET_S = 60.0  # between two lines about an environment that does not answer

_log = logging.getLogger(__name__)


class Turns(NamedTuple):
    messages: list[Message]  # to append; empty: the conversation is over
    reason: str  # why the row is invalid, "" when it is not


class Environments:
    """The environments of a run's domains, None for those that grade single replies. Close it, or use it in `with`.

    Args:
      environments: one entry a domain: a name or path as in registry.py, a grader's name, or an Environment itself.

    Raises ValueError or FileNotFoundError, one line that names the key domains[i].environment.
    """

    def __init__(self, environments: Sequence[str | Environment], threads: int = THREADS):
        self.of_domain: list[Environment | None] = []
        loaded: dict[str, Environment] = {}
        try:
            for number, environment in enumerate(environments):
                key = f"domains[{number}].environment"
                if isinstance(environment, str) and registry.is_multi_turn(environment, key):
                    if environment not in loaded:
                        loaded[environment] = registry.load(environment, key)
                    environment = loaded[environment]
                self.of_domain.append(None if isinstance(environment, str) else environment)
        except Exception:
            for environment in loaded.values():
                _close(environment)
            raise
        self.failures: Counter[tuple[int, str]] = Counter()  # (domain, reason) -> calls that failed
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="environment")
        self._unsaid, self._said_at = 0, -QUIET_S

    def tools(self, domain: int, row: Mapping) -> list[dict] | None:
        """JSON schemas for encode_prompt's `tools` on a row of the domain. Raises ValueError for a row's wrong ones."""
        environment = self.of_domain[domain]
        return None if environment is None else shown_tools(environment, row)

    def interact(
        self, domain_B: Sequence[int], rows: Sequence[Mapping], messages_B: Sequence[Sequence[Message]]
    ) -> list[Turns]:
        """The environment's turns for each conversation, none for domains of single replies. Never raises for what an
        environment does. Rows of one conversation must be asked in the order of its turns."""
        together = defaultdict(list)  # domain -> rows that are answered in one call
        futures = {}
        for b, domain in enumerate(map(int, domain_B)):
            environment = self.of_domain[domain]
            if hasattr(environment, "interact_all"):
                together[domain].append(b)
            elif environment is not None:
                futures[b] = self._threads.submit(_interact, environment, rows[b], messages_B[b])
        many = {
            domain: self._threads.submit(_interact_all, self.of_domain[domain], [messages_B[b] for b in members])
            for domain, members in together.items()
        }
        found = {b: future.result() for b, future in futures.items()}
        for domain, members in together.items():
            found |= zip(members, many[domain].result())
        self._note(domain_B, {b: turns.reason for b, turns in found.items()})
        return [found.get(b, Turns([], "")) for b in range(len(messages_B))]

    def grade(
        self, domain_B: Sequence[int], rows: Sequence[Mapping], messages_B: Sequence[Sequence[Message]]
    ) -> list[Result]:
        """Grades of finished conversations; of a domain of single replies a Result without a grade."""

        def of_one(b: int) -> Result:
            environment = self.of_domain[int(domain_B[b])]
            if environment is None:
                return Result(None, "the domain grades single replies")
            return _answer(lambda: _graded(environment, rows[b], messages_B[b]), lambda reason: Result(None, reason))

        results = list(self._threads.map(of_one, range(len(messages_B))))
        self._note(domain_B, {b: result.reason for b, result in enumerate(results)})
        return results

    def _note(self, domain_B: Sequence[int], reasons: Mapping[int, str]) -> None:
        """Counts what failed, and says so at most once in QUIET_S seconds."""
        failed = {b: reason for b, reason in reasons.items() if reason}
        self.failures.update((int(domain_B[b]), reason) for b, reason in failed.items())
        self._unsaid += len(failed)
        now = time.monotonic()
        if failed and now - self._said_at >= QUIET_S:
            reason = Counter(failed.values()).most_common(1)[0][0]
            _log.warning("%d rows are invalid because their environment failed: %s", self._unsaid, reason)
            self._unsaid, self._said_at = 0, now

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for environment in self.of_domain:
            _close(environment)

    def __enter__(self) -> "Environments":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _interact(environment: Environment, row: Mapping, messages: Sequence[Message]) -> Turns:
    def ask() -> Turns:
        return Turns(checked_turns(of_row(environment, row).interact(messages)), "")

    return _answer(ask, lambda reason: Turns([], reason))


def _interact_all(environment: Environment, conversations: list[Sequence[Message]]) -> list[Turns]:
    def ask() -> list[Turns]:
        answers = environment.interact_all(conversations)
        if len(answers) != len(conversations):
            raise ValueError(f"interact_all answered {len(answers)} of {len(conversations)} conversations")
        return [
            Turns([], str(turns)) if isinstance(turns, Unavailable) else Turns(checked_turns(turns), "")
            for turns in answers
        ]

    return _answer(ask, lambda reason: [Turns([], reason)] * len(conversations))


def _graded(environment: Environment, row: Mapping, messages: Sequence[Message]) -> Result:
    return Result(checked_grade(of_row(environment, row).grade(messages, row.get("answer"))), "")


def _answer(ask: Callable, failed: Callable):
    try:
        return ask()
    except Unavailable as error:
        return failed(" ".join(str(error).split())[:160])
    except (Exception, SystemExit) as error:
        return failed(reason_of(error))


def _close(environment: Environment | None) -> None:
    close = getattr(environment, "close", None)
    if close is not None:
        close()
