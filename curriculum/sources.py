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

import csv
import functools
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from curriculum import generators, gym, suites
from curriculum.bench import BENCH, EDGE, TALK
from curriculum.generators import TINY, Row
from curriculum.row_forms import as_row, columns_fit, tabular, unread, what

GENERATORS = TINY | BENCH | EDGE | TALK

Raw = Iterator[tuple[Any, str]]  # what stands at a place, and the place: file:line
_BLANK = re.compile(r"\s*")


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
        found = suites.rows(suite, _published(_file(name, base)))
    elif reader := READERS.get(Path(source).suffix.lower()):
        found = _rows(reader(_file(source, base)), source)
    elif "@" in source:
        found = _rows(_hub(source), source)
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


def _published(path: Path) -> Raw:
    """Rows as they stand in a file, of whatever fields."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: expected a {', '.join(READERS)} file")
    if reader in (_csv, _parquet):
        return reader(path, lambda names, where: None, lambda raw, where: raw)
    return reader(path)


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


def _text(path: Path) -> str:
    """The file's text without a byte order mark, line ends as they are."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: byte {data[error.start]:#04x} is not UTF-8; save the file as UTF-8"
        ) from error


def _json(path: Path) -> Raw:
    """Elements of a JSON list, each with the line its text starts on; decoded one by one, since a list has no lines."""
    text = _text(path)
    line, counted = 1, 0  # `line` is the line of position `counted`

    def skip(at: int) -> tuple[int, str]:
        """The next position that is not blank and the character there; moves `line` along."""
        nonlocal line, counted
        at = _BLANK.match(text, at).end()
        line, counted = line + text.count("\n", counted, at), at
        return at, text[at : at + 1]

    at, mark = skip(0)
    if mark != "[":
        raise ValueError(
            f"{path}:{line}: the file is no JSON list; expected [...] around the rows (one row a line: .jsonl)"
        )
    at, mark = skip(at + 1)
    while mark != "]":
        raw, at = _decode(text, at, path)
        yield raw, f"{path}:{line}"
        at, mark = skip(at)
        if mark == ",":
            at, mark = skip(at + 1)
            mark = ","  # so that a list cannot end after a comma
        elif mark != "]":
            raise ValueError(f"{path}:{line}: not JSON: {what(mark)} after a row; expected a comma or ]")
    if skip(at + 1)[1]:
        raise ValueError(f"{path}:{line}: not JSON: text after the list; expected nothing after ]")


def _decode(text: str, at: int, path: Path, first_line: int = 1) -> tuple[Any, int]:
    """The JSON value at a position, and the position after it."""
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path}:{line}: not JSON: {error.msg} at column {error.colno}") from error


def _jsonl(path: Path) -> Raw:
    for line, text in enumerate(_text(path).split("\n"), 1):  # not splitlines: JSON text may hold U+2028
        if text := text.strip():
            raw, end = _decode(text, 0, path, line)
            if end != len(text):
                raise ValueError(f"{path}:{line}: not JSON: text after the row; expected one object a line")
            yield raw, f"{path}:{line}"


def _csv(path: Path, columns: Callable = columns_fit, made: Callable = tabular) -> Raw:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    names: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            where, line = f"{path}:{line}", reader.line_num + 1  # a quoted field may hold line ends: a row's first line
            if not fields:
                continue
            if names is None:
                names = [name.strip() for name in fields]
                columns(names, where)
            elif len(fields) != len(names):
                raise ValueError(f"{where}: {len(fields)} fields; expected {len(names)}: {', '.join(names)}")
            else:
                yield made({name: text or None for name, text in zip(names, fields)}, where), where
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: not CSV: {error}") from error


def _parquet(path: Path, columns: Callable = columns_fit, made: Callable = tabular) -> Raw:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error
    try:
        table = parquet.read_table(path)
    except ArrowException as error:
        raise ValueError(f"{path}: not parquet: {str(error).splitlines()[0]}") from error
    columns(table.column_names, str(path))
    for number, raw in enumerate(table.to_pylist(), 1):
        yield made(raw, f"{path}:row {number}"), f"{path}:row {number}"


def _hub(source: str) -> Raw:
    split, _, name = source.partition("@")
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError(f"source {source!r}: reading from the hub needs datasets: pip install datasets") from error
    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library's own, requests', huggingface_hub's: all mean that there are no rows
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"source {source!r}: the hub did not give it ({reason}); download it and name the file"
        ) from error
    columns_fit(table.column_names, source)
    for number, raw in enumerate(table, 1):
        yield tabular(raw, f"{source}:row {number}"), f"{source}:row {number}"


READERS = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
