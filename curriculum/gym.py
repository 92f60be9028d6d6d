"""Rows of reasoning_gym: any of its data sets, by name and parameters.

    gym:NAME[,split=train|test][,size=N][,seed=0][,parameter=value ...]

such as gym:chain_sum,max_terms=3,size=500. A value is a number, true or false, or text; a;b;c is a list. Rows are those
of the data set in its order, without repeats, that fall on the split's side by the hash of their question
(generators.py): train and test share no question, whatever their seeds and sizes. Where a data set runs out of new
questions there are fewer rows.

The row's `meta` says how its entry is made again, for the grader `gym` with the data set's own scorer.

Left out: `composite`, which is a mixture: give its parts as domains.
"""

import json

import yaml

from curriculum.generators import SPLIT_SIZE, Row, side

MOST_DRAWS = 20  # entries looked at for each row wanted, before a data set counts as exhausted
PREFIX = "gym:"


def read(source: str) -> list[Row]:
    """Raises ValueError, one line, on an unknown data set or parameter, or a value that it refuses."""
    name, *pairs = source.removeprefix(PREFIX).split(",")
    own = {"split": "train", "size": None, "seed": 0}
    config: dict[str, object] = {}
    for pair in pairs:
        parameter, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"source {source!r}: {pair!r}; expected parameter=value")
        (own if parameter in own else config)[parameter] = _value(source, parameter, value)
    split, seed = own["split"], own["seed"]
    if split not in SPLIT_SIZE:
        raise ValueError(f"source {source!r}: split={split!r}; expected train or test")
    size = SPLIT_SIZE[split] if own["size"] is None else own["size"]
    for parameter, value, least in (("size", size, 1), ("seed", seed, 0)):
        if type(value) is not int or not least <= value <= 2**31:
            raise ValueError(f"source {source!r}: {parameter}={value!r}; expected a whole number from {least}")
    draws = MOST_DRAWS * size
    data = _data_set(source, name, config, seed, draws)
    kept: dict[str, Row] = {}
    for index in range(draws):
        try:
            entry = data[index]
        except Exception as error:  # of the library's own kinds; some data sets end early
            if kept:
                break
            raise ValueError(
                f"source {source!r}: reasoning_gym made no entry: {type(error).__name__}: {error}"
            ) from error
        question = entry["question"]
        if question not in kept and side(question) == split:
            made = {"name": name, "config": config, "seed": seed, "size": draws, "index": index}
            messages = [{"role": "user", "content": question}]
            answer = str(entry["answer"]) if entry["answer"] not in (None, "") else "-"  # some have a scorer only
            kept[question] = {"messages": messages, "answer": answer, "meta": {"gym": made}, "key": question}
            if len(kept) == size:
                break
    return list(kept.values())


def _value(source: str, parameter: str, text: str) -> object:
    try:
        found = [yaml.safe_load(part) for part in text.split(";")]
    except yaml.YAMLError as error:
        raise ValueError(f"source {source!r}: {parameter}={text!r}; expected a number, true, false or text") from error
    return found if ";" in text else found[0]


def _data_set(source: str, name: str, config: dict, seed: int, size: int):
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(f"source {source!r} needs reasoning_gym: pip install reasoning-gym") from error
    if name not in DATASETS or name == "composite":
        known = ", ".join(sorted(DATASETS.keys() - {"composite"}))
        raise ValueError(f"source {source!r}: reasoning_gym has no data set {name!r}; known: {known}")
    known = [field for field in DATASETS[name][1].__dataclass_fields__ if field not in ("seed", "size")]
    for parameter in config:
        if parameter not in known:
            has = ", ".join(("split", "size", "seed", *known))
            raise ValueError(f"source {source!r}: {name} has no parameter {parameter!r}; known: {has}")
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **given)
    except (AssertionError, TypeError, ValueError) as error:
        said = " ".join(str(error).split()) or "values out of range"
        raise ValueError(f"source {source!r}: {name} refuses {json.dumps(config)}: {said}") from error
