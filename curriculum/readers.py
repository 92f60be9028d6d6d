"""What stands in a file or on the hub, row by row, each with its place, file:line: what curriculum/sources.py checks.

JSON and JSON lines hold any value; a table (CSV, parquet, a hub data set) has columns, of which some are JSON text.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from curriculum.row_forms import columns_fit, tabular, what

Raw = Iterator[tuple[Any, str]]  # what stands at a place, and the place: file:line
_BLANK = re.compile(r"\s*")


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


def hub(source: str) -> Raw:
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


def published(path: Path) -> Raw:
    """Rows as they stand in a file, of whatever fields."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: expected a {', '.join(READERS)} file")
    if reader in (_csv, _parquet):
        return reader(path, lambda names, where: None, lambda raw, where: raw)
    return reader(path)
