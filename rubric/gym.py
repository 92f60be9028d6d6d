"""Grader of reasoning_gym's data sets by their own scorers; rows of curriculum/gym.py.

A row names its data set, parameters, seed and index, and the entry is made again from them: a scorer may read values
that JSON cannot hold. A scorer's 1 is right; anything between says how near, by a rule of its data set.
"""

import json
from functools import lru_cache

from rubric.reading import need, tagged

NEAR = 0.1  # scorers give about 0.01 to any text that is not empty


@lru_cache(maxsize=64)
def data_set(name: str, config: str, seed: int, size: int):
    """A data set by JSON of its parameters. Raises ValueError, one line, on a name or parameter it does not have."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError("rows of reasoning_gym need the package: pip install reasoning-gym") from error
    if name not in DATASETS:
        raise ValueError(f"reasoning_gym has no data set {name!r}; known: {', '.join(sorted(DATASETS))}")
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(config).items()}
    known = [field for field in DATASETS[name][1].__dataclass_fields__ if field not in ("seed", "size")]
    for key in given:
        if key not in known:
            raise ValueError(f"reasoning_gym {name} has no parameter {key!r}; it has {', '.join(known)}")
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **given)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"reasoning_gym {name} refuses {config}: {' '.join(str(error).split())}") from error


def gym(reply: str, answer: object, meta: dict) -> int:
    """meta["gym"] = {"name", "config", "seed", "size", "index"}.

    4 the reply, but for outer white space, scores 1; 3 its last <answer>, or its last line, does; 2 one of them scores
    NEAR or more; 1 else.
    """
    made = need(meta, "gym", "gym")
    config = json.dumps(made["config"], sort_keys=True)
    data = data_set(made["name"], config, made["seed"], made["size"])
    entry = data[made["index"]]

    def score(text: str) -> float:
        try:
            return float(data.score_answer(text, entry))
        except Exception:  # a scorer reads what a policy wrote: what it cannot read is not right
            return 0.0

    whole = reply.strip()
    inner = tagged(reply)
    inner = whole.split("\n")[-1] if inner is None else inner
    first, second = score(whole), score(inner.strip())
    if first >= 1.0:
        return 4
    if second >= 1.0:
        return 3
    return 2 if max(first, second) >= NEAR else 1
