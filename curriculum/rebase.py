"""The scheduler's knowledge of a domain whose grader has changed, moved to the grader's new scale.

When fixed replies are graded anew and their pass rate has moved by `shift` (rubric/anchors.py), the policy is what it
was: its moving average must move, and no fall may be seen in it. Between the last re-grading that found nothing and
this one, n groups of the domain were graded, some before and some after the change. With the change taken to lie
midway, the part (1 - beta)^(n / 2) of the average is still on the old scale:

    acc' = clip(acc + (1 - beta)^(n / 2) shift, 0, 1)

and likewise for the fast average and the mean grade, whose variance stays within its bound. With n = 0, a grader
exchanged while the run stood still, the whole shift counts. The band is that of the new average. The detector of falls
starts anew: no alarm in its first visits, no flag left that the old grader's grades had raised.

Left out: single prompts' averages, since a grader's shift leaves their order within a domain about as it was, and what
has no unit of grades (cost, half-life, shares of groups without a difference).
"""

import chex
import jax
import jax.numpy as jnp

from curriculum import drift
from curriculum.config import GRADE_MAX, GRADE_MIN, CurriculumConfig
from curriculum.triage import TriageState, band_of


def rebase(
    config: CurriculumConfig,
    state: TriageState,
    drifted_D: jax.Array,
    shift_D: jax.Array,
    grade_shift_D: jax.Array,
    groups_D: jax.Array,
) -> TriageState:
    """`state` on the new scale in the domains drifted_D; the others' leaves stay bit for bit.

    Args:
      drifted_D: bool[D]. shift_D: f32[D], change of the pass rate of fixed replies, in [-1, 1].
      grade_shift_D: f32[D], change of their mean grade, in [-3, 3].
      groups_D: [D], groups graded since the last re-grading that found nothing; 0 or more.
    """
    chex.assert_equal_shape([state.acc_ema, drifted_D, shift_D, grade_shift_D, groups_D])
    half_D = jnp.asarray(groups_D, jnp.float32) / 2

    def on_the_old(beta: float) -> jax.Array:
        return (1 - beta) ** half_D  # 0 to the power 0 is 1: nothing was graded

    old_D = on_the_old(config.beta)
    acc_D = jnp.clip(state.acc_ema + old_D * shift_D, 0.0, 1.0)
    mean_D = jnp.clip(state.grade_mean + old_D * grade_shift_D, GRADE_MIN, GRADE_MAX)
    moved = dict(
        acc_ema=acc_D,
        fast_acc=jnp.clip(state.fast_acc + on_the_old(config.fast_beta) * shift_D, 0.0, 1.0),
        grade_mean=mean_D,
        grade_uncertainty=jnp.minimum(state.grade_uncertainty, (GRADE_MAX - mean_D) * (mean_D - GRADE_MIN)),
        performance_band=band_of(config, acc_D),
        ref_mean=acc_D,
    )
    moved = {name: jnp.where(drifted_D, new_D, getattr(state, name)) for name, new_D in moved.items()}
    return drift.restart(state._replace(**moved), drifted_D)
