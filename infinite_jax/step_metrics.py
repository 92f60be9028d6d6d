"""What a step's row of metrics.jsonl says of its rollouts, grades, update and scheduler: name -> number or None."""

from collections.abc import Mapping, Sequence

import numpy as np

from infinite_jax import resampling, rows
from infinite_jax.rows import Round
from rubric import watch
from rubric.evaluator import Grades
from rubric.schema import Rubric
from sharding import exchange

Metrics = dict[str, float | int | None]


def of_step(
    rounds: Sequence[Round],
    single,
    update: Mapping,
    triage: Mapping[str, np.ndarray],
    names: Sequence[str],
    rubrics: Sequence[Rubric | None],
    talks: Sequence[bool],
) -> Metrics:
    """Of all that was generated. What a domain did not show this step is None.

    Args:
      single: whether the batch was one domain's. update: scalars of the update. triage: arrays [D] by name.
      names, rubrics: of the D domains. talks: whether a domain holds conversations.
    """
    rollouts = [done.rollout for done in rounds]
    tokens_B = np.concatenate([rows.generated(rollout.loss_mask_BT) for rollout in rollouts])
    turns_B = np.concatenate([rows.turns(rollout.loss_mask_BT) for rollout in rollouts]) if any(talks) else None
    done_B = np.concatenate([exchange.whole(rollout.done_B) for rollout in rollouts])
    domain_B = np.concatenate([rollout.domain_B for rollout in rollouts])
    grades = Grades(*map(np.concatenate, zip(*(done.grades for done in rounds))))
    scores_BK = np.concatenate([done.scores_BK for done in rounds])
    valid_B = grades.valid_B
    shown = {
        "reward/mean": mean(grades.reward_B[valid_B]),
        "reward/grade": mean(grades.grade_B[valid_B]),
        "reward/differing": mean(np.concatenate([differing(done) for done in rounds])),
        "rollout/invalid": 1.0 - float(valid_B.mean()),
        "rollout/length": float(tokens_B.mean()),
        "rollout/truncated": 1.0 - float(done_B.mean()),
        "rollout/rounds": len(rounds),
        "tokens/generated": int(tokens_B.sum()),
        "curriculum/single_domain": float(single),
    }
    shown |= {name: float(value) for name, value in update.items()}
    for d, (name, rubric) in enumerate(zip(names, rubrics, strict=True)):
        here_B = domain_B == d
        shown[f"pass_rate/{name}"] = mean(grades.grade_B[valid_B & here_B] >= 3)
        if talks[d]:
            shown[f"rollout/turns/{name}"] = mean(turns_B[here_B])
        shown |= {f"{key}/{name}": value_D[d].item() for key, value_D in triage.items()}
        shown |= watch.observe(rubric, scores_BK[here_B], tokens_B[here_B], name)
    return shown


def differing(done: Round) -> np.ndarray:
    """bool of the groups with two graded replies or more: whether their rewards differ; else nobody learns."""
    graded_P = done.grades.valid_B.reshape(len(done.chosen), -1).sum(axis=1)
    return resampling.differs(done)[graded_P > 1]


def mean(x: np.ndarray) -> float | None:
    return float(x.mean()) if x.size else None
