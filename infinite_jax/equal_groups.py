"""Says once that a run learns nothing from its rewards because every group's replies are rewarded alike.

Against its group a reply counts by what it is above or below the others (grpo.group_advantage): where all of a group
have one reward, none has an advantage, and where that holds in every group of every step, the run only costs time. A
critic's advantages are another matter.
"""

import sys

from configs.schema import Config
from infinite_jax.step_metrics import Metrics
from sharding import multihost

STEPS = 5  # from the start of training, or of its continuation


class EqualGroups:
    """`after` each step; all processes may call it, the first one prints."""

    def __init__(self, config: Config):
        self.config, self._rewards = config, []
        self._watching = config.algorithm.advantage != "gae"

    def after(self, metrics: Metrics) -> None:
        differing = metrics["reward/differing"]
        if not self._watching or differing is None:  # nothing was graded: that is said elsewhere
            return
        self._rewards.append(metrics["reward/mean"])
        self._watching = differing == 0 and len(self._rewards) < STEPS
        if differing == 0 and not self._watching and multihost.is_first():
            print(f"warning: {self.line()}", file=sys.stderr, flush=True)

    def line(self) -> str:
        algorithm, mean = self.config.algorithm, sum(self._rewards) / len(self._rewards)
        rows = "harder rows" if mean > 0.5 else "easier rows, or a grader that tells near misses (grade 2) from nothing"
        graded = "rubric.reward=graded, " if self.config.rubric.reward == "pass" else ""
        return (
            f"in {STEPS} steps no group's replies were rewarded differently (mean reward {mean:.3f}), so nothing was "
            f"learnt from them: try {graded}{rows}, algorithm.temperature above {algorithm.temperature:g}, or "
            f"algorithm.group_size above {algorithm.group_size}"
        )
