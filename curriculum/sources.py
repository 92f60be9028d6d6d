"""Rows from a source: files, hub data sets, generators.

A row is {"messages": [{"role", "content"}, ...], "answer": ..., "meta"?: {...}, "tools"?: [...], "key"?: "..."}. The
last message is the user's; earlier ones are context and are never trained on. `answer` is text, a list of accepted
texts, or whatever JSON the domain's grader reads; `meta` is the grader's; `tools` are JSON schemas of functions that
the row offers; `key` identifies the instance (generators.py). Other fields are dropped, equal rows are kept. A source
is one of

    rows.json                a JSON list of rows
    rows.jsonl               one row a line
    rows.csv                 columns `answer` (text) and `messages` (JSON text), `prompt` or `question` (text);
                             optional `meta` and `tools` (JSON text), `key`
    rows.parquet             the same columns, what is JSON text there or nested (needs pyarrow)
    train@name               a split of a hub data set with such columns (needs datasets, and the network once)
    gen:reverse,split=test   rows of a procedural domain (generators.py has its parameters)
    gen:sort,difficulty=1..4 the same at several levels of difficulty
    gym:gcd,max_value=20     rows of a data set of reasoning_gym (gym.py)
    suite:gsm8k:test.jsonl   a published evaluation suite in a file, for `test` alone (suites.py)

The first row that does not fit ends reading with file:line and what was expected: nothing is skipped but blank lines.
"""

import os
from pathlib import Path
from typing import Any

from curriculum import generators, gym, readers, suites
from curriculum.bench import BENCH, EDGE, TALK
from curriculum.generators import TINY, Row
from curriculum.readers import READERS, what

GENERATORS = TINY | BENCH | EDGE | TALK
ROLES = ("system", "user", "assistant", "tool")


def read(source: str, base: str | os.PathLike | None = None) -> list[Row]:
    """All rows of a source, in its order; a relative path is taken from `base` (default: the working directory).

    Raises ValueError or FileNotFoundError, one line with file:line.
    """
    if source.startswith("gen:"):
        found = generators.read(source, GENERATORS)
    elif source.startswith(gym.PREFIX):
        found = gym.read(source)
    elif source.startswith(suites.PREFIX):
        suite, name = suites.parts(source)
        found = suites.rows(suite, readers.published(_file(name, base)))
    elif reader := READERS.get(Path(source).suffix.lower()):
        found = [_row(raw, where) for raw, where in reader(_file(source, base))]
    elif "@" in source:
        found = [_row(raw, where) for raw, where in readers.hub(source)]
    else:
        raise ValueError(
            f"source {source!r}: expected a {', '.join(READERS)} file, split@hub-name, or gen:NAME, gym:NAME, "
            "suite:NAME:PATH"
        )
    if not found:
        raise ValueError(f"{source}: no rows; expected at least one {{messages, answer}}")
    return found


def made_for(source: str) -> str | None:
    """The grader that a source's rows are made for, None for rows of the user's own. Reads nothing."""
    if source.startswith(gym.PREFIX):
        return "gym"
    if source.startswith(suites.PREFIX):
        return suites.parts(source)[0].environment
    generator = GENERATORS.get(source.removeprefix("gen:").split(",")[0]) if source.startswith("gen:") else None
    return generator.environment if generator else None


def maker(source: str | None) -> str | None:
    """The generator whose canonical keys a source's rows carry, None where they carry none or the user's own."""
    return generators.generator_name(source) if source and source.startswith("gen:") else None


def _file(name: str, base: str | os.PathLike | None) -> Path:
    path = Path(base or "") / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; relative paths are taken from {Path(base or '').resolve()}")
    return path


def levels(source: str) -> tuple[int, int]:
    """Easiest and hardest level of a source's rows, (1, 4) for gen:sort,difficulty=1..4; (1, 1) where it has no levels.

    Reads nothing. Raises ValueError, one line, on a generator's source that cannot be read, and on a suite.
    """
    if source.startswith(suites.PREFIX):
        raise ValueError(f"source {source!r}: a suite is for evaluation: name it under `test`, with eval_only: true")
    return generators.level_range(source, GENERATORS) if source.startswith("gen:") else (1, 1)


def read_levels(source: str, base: str | os.PathLike | None = None) -> dict[int, list[Row]]:
    """The rows of a source by level, easiest first; raises as `read` does."""
    if not source.startswith("gen:"):
        return {1: read(source, base)}
    found = generators.read_levels(source, GENERATORS)
    for level, rows in found.items():
        if not rows:
            raise ValueError(f"{source}: no rows at level {level}; raise its easier end")
    return found


def _row(raw: Any, where: str) -> Row:
    """`raw` as a row with the contract's fields only, or ValueError that begins with `where`."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: the row is {what(raw)}; expected an object {{messages, answer}}")
    row: Row = {"messages": _messages(raw.get("messages"), where), "answer": raw.get("answer")}
    if row["answer"] in (None, "", []):
        raise ValueError(f"{where}: answer is {what(row['answer'])}; expected text, a list of texts, or JSON")
    for field, kind, expected in (("meta", dict, "an object"), ("tools", list, "a list"), ("key", str, "text")):
        if (value := raw.get(field)) is not None:
            if not isinstance(value, kind):
                raise ValueError(f"{where}: {field} is {what(value)}; expected {expected}")
            row[field] = value
    return row


def _messages(messages: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"{where}: messages is {what(messages)}; expected a list of {{role, content}}, the user's last"
        )
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"{where}: messages[{i}] is {what(message)}; expected an object {{role, content}}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"{where}: messages[{i}].role is {what(role)}; expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"{where}: messages[{i}].content is {what(content)}; expected text")
    if role != "user" or not content.strip():
        raise ValueError(f"{where}: the last message is {what(messages[-1])}; expected one of the user's, with text")
    return [{"role": message["role"], "content": message["content"]} for message in messages]
