"""Rows of a rollout on the host: each process reads and grades those of which it holds the first replica.

What all must know of every row, its grade and its length, is exchanged; what was written is not.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from infinite_jax import prompts
from infinite_jax.prompts import Prompt
from infinite_jax.types import Rollout
from rubric.evaluator import Grades, RubricEvaluator, Scored
from rubric.pool import Result
from sharding import exchange


class Round(NamedTuple):
    """P prompts and what came of them; more than one a step only under dynamic sampling."""

    chosen: list[Prompt]
    rollout: Rollout
    replies: list[str | None]  # of P x G rows, or their conversations; None where another process holds the row
    grades: Grades
    scores_BK: np.ndarray  # criteria and measures: rubric.scoring.of_domain. K = 0 where no domain has a rubric


def generated(mask_BT: jax.Array) -> np.ndarray:
    """i32[B], tokens that the policy wrote in each row, on every process."""
    return exchange.whole(_sums(mask_BT))


def turns(mask_BT: jax.Array) -> np.ndarray:
    """i32[B], how often the policy spoke in each row, on every process."""
    return exchange.whole(_begun(mask_BT))


def read(tokenizer, tokens_BT: jax.Array, mask_BT: jax.Array) -> list[str | None]:
    """What the policy wrote in each of the rows that this process holds, None in the others."""
    (number_R, tokens_RT), (_, mask_RT) = exchange.held(tokens_BT), exchange.held(mask_BT)
    replies = [None] * len(tokens_BT)
    for number, reply in zip(number_R, prompts.replies(tokenizer, tokens_RT, mask_RT)):
        replies[number] = reply
    return replies


def grade(
    grader: RubricEvaluator,
    prompt_B: Sequence[Prompt],
    replies: Sequence[str | None],
    graded: Mapping[int, Result] = MappingProxyType({}),
) -> tuple[np.ndarray, Scored]:
    """(bool[B], the rows that have a reply; what they scored, zeros and NaN in the others): see `whole`.

    graded: by row, what an environment made of its conversation.
    """
    mine_B = np.array([reply is not None for reply in replies], bool)
    row_R = np.flatnonzero(mine_B)
    asked = [prompt_B[b] for b in row_R]
    graded_R = {place: graded[b] for place, b in enumerate(row_R.tolist()) if b in graded}
    found, scores_RK = grader.score(
        [p.domain for p in asked], [p.row for p in asked], [replies[b] for b in row_R], graded_R
    )
    grades = Grades(*(np.zeros(len(replies), value_R.dtype) for value_R in found))
    for value_B, value_R in zip(grades, found):
        value_B[row_R] = value_R
    scores_BK = np.full((len(replies), scores_RK.shape[1]), np.nan, scores_RK.dtype)
    scores_BK[row_R] = scores_RK
    return mine_B, Scored(grades, scores_BK)


def whole(mine_B: np.ndarray, scored: Scored) -> Scored:
    """Each row from the process that graded it; all call it together."""
    *grades, scores_BK = exchange.rows(mine_B, (*scored.grades, scored.scores_BK))
    return Scored(Grades(*grades), scores_BK)


_sums = jax.jit(lambda mask_BT: jnp.sum(mask_BT, axis=1))
_begun = jax.jit(lambda mask_BT: jnp.sum(mask_BT[:, 1:] & ~mask_BT[:, :-1], axis=1))
