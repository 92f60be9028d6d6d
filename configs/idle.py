"""Keys of the command line that this run would never read.

Only what was typed is refused, not what a file holds: a file serves several algorithms and sets of domains, and
model=tiny itself states the learning rate of a critic that most runs do not have. Nothing is lost on a choice of
groups, `algorithm=grpo` over a file that begins with ppo, and a saved configuration resumes.
"""

from collections.abc import Iterable, Sequence

from configs.schema import Config, get
from rubric import schema

OF_GAE = ("gamma", "gae_lambda", "critic_learning_rate", "value_clip", "freeze_steps")  # and of its critic


def check(configs: Sequence[Config], typed: Iterable[str]) -> None:
    """Raises ValueError, one line, on a key or group among the key=value of `typed` that none of `configs` asks for."""
    for text in typed:
        key = text.partition("=")[0].lstrip("+~")
        reasons = [_why_unread(config, key) for config in configs]
        if all(reasons):
            raise ValueError(reasons[0])


def _why_unread(config: Config, key: str) -> str:
    """One line; "" where `config` reads the key."""
    section, _, name = key.partition(".")
    advantage = config.algorithm.advantage
    if section == "algorithm" and name in OF_GAE and advantage != "gae":
        return (
            f"{key}={get(config, key)}: algorithm.advantage={advantage} never reads it: leave it out, or set "
            "algorithm=ppo"
        )
    if config.rubric.judge is not None and (key == "rubric" or key.startswith("rubric.judge")):
        rubrics = schema.load_all([domain.rubric for domain in config.domains])
        if not any(rubric and rubric.judged for rubric in rubrics):
            return (
                f"{key}: no domain asks a judge, so none would be asked: leave it out, or give a domain a rubric "
                "with one, such as `rubric: creative_judged`"
            )
    return ""
