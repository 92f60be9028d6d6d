"""A domain of whose replies none could be graded before the first step ends the run: it would train on nothing there.

A file that lacks what it imports, a row that lacks what its grader reads, a judge or a service that does not answer:
whatever it is, nothing is lost yet but one evaluation, and a run that went on would spend its steps on the other
domains. Later it is another matter: what cannot be graded then is left out of the step and said, since a service that
is down for a while must not cost a run.
"""

import itertools
from collections import Counter
from collections.abc import Mapping

import numpy as np

from configs import cli
from infinite_jax.heldout import Results
from infinite_jax.session import Session
from sharding import exchange


def of_all(failures: Mapping[tuple[int, str], int]) -> Counter[tuple[int, str]]:
    """Rows by domain and reason, of all processes, which call it together."""
    found = Counter()
    for domain, reason, rows in itertools.chain.from_iterable(exchange.gather([[*k, n] for k, n in failures.items()])):
        found[domain, reason] += rows
    return found


def refuse(session: Session, results: Results) -> None:
    """Ends all processes with one line and exit code 2 where a domain has no grade in the first evaluation."""
    silent = [name for name, result in results.items() if len(result.greedy_N) and np.isnan(result.greedy_N).all()]
    if not silent:  # alike on all processes
        return
    name, failures = silent[0], of_all(session.grader.failures)
    reasons = Counter({reason: rows for (d, reason), rows in failures.items() if session.names[d] == name})
    reason = reasons.most_common(1)[0][0] if reasons else "no reason given"
    others = f" (nor of {', '.join(silent[1:])})" if silent[1:] else ""
    with cli.bad_input():
        raise ValueError(
            f"domain {name}: none of its {len(results[name].greedy_N)} held-out replies could be graded{others}: "
            f"{reason}: mend its file or service and resume, or begin another run without the domain; a reply that a "
            "grader cannot read has grade 1"
        )
