"""Rows from a source: files, hub data sets, generators.

A row is {"messages": [{"role", "content"}, ...], "answer": ..., "meta"?: {...}, "tools"?: [...], "key"?: "..."}, or one
of the other forms of row_forms.py. The last message is the user's; earlier ones are context and are never trained on.
`answer` is text, a list of accepted texts, or whatever JSON the domain's grader reads; `meta` is the grader's; `tools`
are JSON schemas of functions that the row offers; `key` identifies the instance (generators.py). Other fields are
dropped, with a line on stderr that names them; equal rows are kept. A source is one of

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

import functools
import os
import sys
from pathlib import Path

from curriculum import generators, gym, readers, suites
from curriculum.bench import BENCH, EDGE, TALK
from curriculum.generators import TINY, Row
from curriculum.readers import READERS, Raw
from curriculum.row_forms import as_row, unread

GENERATORS = TINY | BENCH | EDGE | TALK


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
        found = _rows(reader(_file(source, base)), source)
    elif "@" in source:
        found = _rows(readers.hub(source), source)
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


def _rows(found: Raw, source: str) -> list[Row]:
    """Checked rows; says once which fields of them nobody reads."""
    rows, dropped = [], {}
    for raw, where in found:
        rows.append(as_row(raw, where))
        dropped |= dict.fromkeys(unread(raw))
    if dropped:
        _say(f"{source}: the rows' {', '.join(dropped)} are not read; what a grader is to see stands in `meta`")
    return rows


@functools.cache  # a file may be read more than once, by the gate and by the run
def _say(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)
