"""What the policy wrote: a few of the best and worst training rows of some steps, for RUN_DIR/transcripts.jsonl.

One object a line: {step, kind: best | worst, domain, prompt, reply, answer, grade, reward}. `prompt` is the last thing
the user said. The file is bounded: 2 ROWS lines a recorded step, no text longer than LIMIT characters. Which rows are
taken depends on the step and its grades alone, so that a resumed run writes the same file.

Left out: rows without a valid grade (they train nothing; the run warns of them by domain and reason) and the earlier
turns of a prompt.
"""

import json
from collections.abc import Sequence

import numpy as np

from infinite_jax.prompts import Prompt
from rubric.evaluator import Grades
from sharding import exchange

ROWS = 3  # best rows a step, and worst ones
LIMIT = 2000  # characters of a text


def due(step: int, eval_every: int) -> bool:
    """Whether the rows of `step` are kept: the first step after each regular evaluation, so 1, 1 + eval_every, ...

    The step of the evaluation itself would often be a single-domain one, curriculum.single_every being a divisor.
    """
    return (step - 1) % eval_every == 0


def pick(
    step: int,
    chosen: Sequence[Prompt],
    replies: Sequence[str | None],
    grades: Grades,
    names: Sequence[str],
    k: int = ROWS,
) -> list[dict]:
    """At most k best rows by reward, best first, then at most k worst, worst first; no row is both.

    Equal rewards go to domains not shown yet, in an order that moves on by one domain a step, then to other prompts.

    Args:
      chosen: P prompts. replies: P x G texts in the rollout's row order, None where another process has the row; all
        processes call it together. grades: of the same rows.
    """
    rows, group = np.flatnonzero(grades.valid_B).tolist(), len(replies) // max(len(chosen), 1)
    half, domain_P = min(k, len(rows) // 2), [(prompt.domain - step) % len(names) for prompt in chosen]
    best = _extremes(rows, min(k, len(rows) - half), group, domain_P, grades.reward_B)
    rest = [b for b in rows if b not in best]
    kinds = (("best", best), ("worst", _extremes(rest, half, group, domain_P, -grades.reward_B)))
    written = _written(replies, [b for _, taken in kinds for b in taken])
    return [
        {
            "step": step,
            "kind": kind,
            "domain": names[chosen[b // group].domain],
            "prompt": cut(_asked(chosen[b // group].row)),
            "reply": written[b],
            "answer": cut(_text(chosen[b // group].row.get("answer"))),
            "grade": round(float(grades.grade_B[b]), 6),
            "reward": round(float(grades.reward_B[b]), 6),
        }
        for kind, taken in kinds
        for b in taken
    ]


def _extremes(rows: Sequence[int], count: int, group: int, domain_P: Sequence[int], reward_B: np.ndarray) -> list[int]:
    """`count` of the rows by falling reward. domain_P: numbers of the prompts' domains, the first of equals first."""
    taken, shown, shown_prompts = [], set(), set()
    for _ in range(count):
        most = min(
            (b for b in rows if b not in taken),
            key=lambda b: (
                -float(reward_B[b]),
                domain_P[b // group] in shown,
                b // group in shown_prompts,
                domain_P[b // group],
                b,
            ),
        )
        taken.append(most)
        shown.add(domain_P[most // group])
        shown_prompts.add(most // group)
    return taken


def _written(replies: Sequence[str | None], rows: Sequence[int]) -> dict[int, str]:
    """The replies of these rows, cut, on every process."""
    everyone = exchange.gather([None if replies[b] is None else cut(replies[b]) for b in rows])
    return {b: next(text for text in texts if text is not None) for b, texts in zip(rows, zip(*everyone))}


def cut(text: str, limit: int = LIMIT) -> str:
    """The text, or its beginning and how much is missing."""
    return text if len(text) <= limit else f"{text[:limit]} [... {len(text) - limit} more characters]"


def _asked(row: dict) -> str:
    said = [message for message in row["messages"] if message.get("role") == "user"] or row["messages"]
    return _text(said[-1]["content"])


def _text(value) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
