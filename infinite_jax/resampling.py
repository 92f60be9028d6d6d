"""Dynamic sampling (DAPO, arXiv 2503.14476): groups without a difference in reward give way to drawn-again ones."""

import jax
import jax.numpy as jnp
import numpy as np

from curriculum.triage import ZERO_VARIANCE
from infinite_jax.rows import Round
from infinite_jax.types import Rollout
from rubric.evaluator import Grades


def differs(done: Round) -> np.ndarray:
    """bool[P], groups whose valid rewards are not all equal: those that give a gradient (grpo.group_advantage)."""
    reward_PG, valid_PG = (x.reshape(len(done.chosen), -1) for x in (done.grades.reward_B, done.grades.valid_B))
    high_P = np.where(valid_PG, reward_PG, -np.inf).max(axis=1)
    low_P = np.where(valid_PG, reward_PG, np.inf).min(axis=1)
    return high_P - low_P > ZERO_VARIANCE


def replace_equal(kept: Round, more: Round) -> Round:
    """`kept` with as many of its equal groups replaced by differing ones of `more` as there are."""
    P, G = len(kept.chosen), len(kept.replies) // len(kept.chosen)
    group_P, free = np.arange(P), np.flatnonzero(~differs(kept))
    found = np.flatnonzero(differs(more))[: len(free)]
    group_P[free[: len(found)]] = P + found
    row_B = (group_P[:, None] * G + np.arange(G)).reshape(-1)
    rollout, both = _take_rows(kept.rollout, more.rollout, row_B), kept.replies + more.replies
    # on the host, as in a rollout that was not mixed: what follows would be compiled twice
    domain_B = np.concatenate([kept.rollout.domain_B, more.rollout.domain_B])[row_B]
    rollout = rollout._replace(domain_B=domain_B, prompt_B=kept.rollout.prompt_B)
    grades = Grades(*(np.concatenate(pair)[row_B] for pair in zip(kept.grades, more.grades)))
    chosen = [[*kept.chosen, *more.chosen][p] for p in group_P]
    scores_BK = np.concatenate([kept.scores_BK, more.scores_BK])[row_B]
    return Round(chosen, rollout, [both[b] for b in row_B], grades, scores_BK)


@jax.jit
def _take_rows(a: Rollout, b: Rollout, row_B: np.ndarray) -> Rollout:
    """Rows of both, those of `b` numbered after those of `a`."""
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y])[row_B], a, b)
