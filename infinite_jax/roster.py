"""What configuration and rows say about the domains, as the scheduler takes it."""

import itertools

import numpy as np

from configs.schema import Config
from curriculum import domains
from curriculum.triage import NEVER, Roster, roster
from infinite_jax.prompts import Prompt
from rubric.evaluator import is_fixed


def mute_of(train: list[dict[int, list[Prompt]]]) -> np.ndarray | None:
    """bool[D], domains with rows of a fixed grade; None where there are none."""
    mute_D = np.array([any(is_fixed(prompt.row) for prompt in itertools.chain(*levels.values())) for levels in train])
    return mute_D if mute_D.any() else None


def members(config: Config, size_D: np.ndarray) -> Roster:
    """What the configuration says about its domains; size_D: i32[D], training rows."""
    ends = [domains.level_ends(domain) for domain in config.domains]
    adaptive = config.curriculum.difficulty == "adaptive"
    return roster(
        len(config.domains),
        weight=[domain.weight for domain in config.domains],
        size=size_D,
        active=[not domain.eval_only for domain in config.domains],
        is_new=[domain.new for domain in config.domains],
        arrives=[domain.arrives for domain in config.domains],
        retires=[NEVER if domain.retires is None else domain.retires for domain in config.domains],
        level=[easiest for easiest, _ in ends],
        level_min=[easiest for easiest, _ in ends],
        level_max=[hardest if adaptive else easiest for easiest, hardest in ends],
    )
