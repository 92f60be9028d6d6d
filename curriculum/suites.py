"""Evaluation suites in their published forms, as rows of domains that are evaluated only.

    suite:NAME:PATH      such as suite:gsm8k:data/gsm8k_test.jsonl, for `test`, with eval_only: true

    suite      file                          fields read                                  environment
    math500    test.jsonl of MATH-500        problem, answer, unique_id                   orz
    gsm8k      test.jsonl                    question, answer ("... #### 72")             orz
    humaneval  HumanEval.jsonl               task_id, prompt, entry_point, test           asserts
    mbpp       mbpp.jsonl                    task_id, text, test_list, test_setup_code    asserts
               sanitized-mbpp.json           task_id, prompt, test_list, test_imports
    ifeval     input_data.jsonl              key, prompt, instruction_id_list, kwargs     ifeval
    simpleqa   simple_qa_test_set.csv        problem, answer                              eq

Lightman et al. 2023 (2305.20050), Cobbe et al. 2021 (2110.14168), Chen et al. 2021 (2107.03374), Austin et al. 2021
(2108.07732), Zhou et al. 2023 (2311.07911), Wei et al. 2024 (2411.04368).

A file may be .jsonl, .json (a list), .csv or .parquet, each with these fields. The question stands alone in the prompt
but for one line that says how to answer, where the suite does not say so itself. simpleqa's own grader is a model; `eq`
asks for the words of the answer, and a rubric with a judge comes nearer.

Left out: few-shot prompts, and training on these files: their tests are public, and a score would mean nothing.
"""

import ast
import builtins
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from curriculum.generators import Row

PREFIX = "suite:"
BOXED = "Give the final answer in \\boxed{}."
SHORT = "Answer with the name, number or date alone."
_BUILTIN = frozenset(dir(builtins))


class Suite(NamedTuple):
    environment: str  # the grader its rows are made for
    fields: tuple[tuple[str, ...], ...]  # what a row must have: one of each
    row: Callable[[dict[str, Any], str], Row]


def _asked(question: str, answer: object, key: str, meta: dict[str, Any] | None = None) -> Row:
    row: Row = {"messages": [{"role": "user", "content": question}], "answer": answer, "key": key}
    return row if meta is None else row | {"meta": meta}


def _text(raw: dict[str, Any], field: str, where: str) -> str:
    if not isinstance(raw[field], str) or not raw[field].strip():
        raise ValueError(f"{where}: {field} is {str(raw[field])[:40]!r}; expected text")
    return raw[field]


def _texts(raw: dict[str, Any], field: str, where: str) -> list[str]:
    value = raw.get(field)
    value = list(value) if isinstance(value, Iterable) and not isinstance(value, str | dict) else value
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{where}: {field} is {str(value)[:40]!r}; expected a list of texts")
    return value


def _math500(raw: dict[str, Any], where: str) -> Row:
    problem = _text(raw, "problem", where)
    return _asked(f"{problem}\n\n{BOXED}", _text(raw, "answer", where), str(raw.get("unique_id") or problem))


def _gsm8k(raw: dict[str, Any], where: str) -> Row:
    question, worked = _text(raw, "question", where), _text(raw, "answer", where)
    found = re.search(r"####\s*(\S[^\n]*?)\s*$", worked)
    if not found:
        raise ValueError(f"{where}: answer has no #### before its result; expected GSM8K's own form")
    return _asked(f"{question}\n\n{BOXED}", found.group(1).replace(",", ""), question)


def _humaneval(raw: dict[str, Any], where: str) -> Row:
    prompt, entry = _text(raw, "prompt", where), _text(raw, "entry_point", where)
    meta = {"entry": entry, "prefix": prompt, "setup": _python(raw, "test", where), "tests": [f"check({entry})"]}
    question = f"Complete this Python function. Answer with the whole function, code only.\n\n{prompt}"
    return _asked(question, str(raw.get("canonical_solution") or entry), str(raw["task_id"]), meta)


def _mbpp(raw: dict[str, Any], where: str) -> Row:
    task = _text(raw, "text" if "text" in raw else "prompt", where)
    tests = _texts(raw, "test_list", where)
    setup = raw.get("test_setup_code") or "\n".join(_texts({"test_imports": []} | raw, "test_imports", where))
    meta = {"entry": _called(tests, where), "tests": tests, "setup": setup}
    question = f"{task}\nAnswer with the function, code only. It must pass these tests:\n\n" + "\n".join(tests)
    return _asked(question, str(raw.get("code") or meta["entry"]), f"mbpp {raw['task_id']}", meta)


def _called(tests: list[str], where: str) -> str:
    """The function that all the tests call and that Python does not have itself."""
    called: list[list[str]] = []
    for test in tests:
        try:
            calls = [node.func for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Call)]
        except SyntaxError as error:
            raise ValueError(f"{where}: test_list holds {test[:40]!r}, which is no Python") from error
        called.append([call.id for call in calls if isinstance(call, ast.Name) and call.id not in _BUILTIN])
    own = [name for name in (called or [[]])[0] if all(name in names for names in called)]
    if not own:
        raise ValueError(f"{where}: test_list calls no function by name in every test")
    return own[0]


def _python(raw: dict[str, Any], field: str, where: str) -> str:
    source = _text(raw, field, where)
    try:
        ast.parse(source)
    except SyntaxError as error:
        raise ValueError(f"{where}: {field} is no Python: {error.msg} on its line {error.lineno}") from error
    return source


def _ifeval(raw: dict[str, Any], where: str) -> Row:
    kinds, given = _texts(raw, "instruction_id_list", where), raw["kwargs"]
    given = list(given) if isinstance(given, Iterable) and not isinstance(given, str | dict) else given
    if not isinstance(given, list) or len(given) != len(kinds):
        raise ValueError(f"{where}: kwargs has not one entry for each of {len(kinds)} in instruction_id_list")
    meta = {"instruction_id_list": kinds, "kwargs": [dict(each or {}) for each in given]}
    return _asked(_text(raw, "prompt", where), "-", f"ifeval {raw['key']}", meta)


def _simpleqa(raw: dict[str, Any], where: str) -> Row:
    problem = _text(raw, "problem", where)
    return _asked(f"{problem}\n{SHORT}", _text(raw, "answer", where), problem)


SUITES: dict[str, Suite] = {
    "math500": Suite("orz", (("problem",), ("answer",)), _math500),
    "gsm8k": Suite("orz", (("question",), ("answer",)), _gsm8k),
    "humaneval": Suite("asserts", (("task_id",), ("prompt",), ("entry_point",), ("test",)), _humaneval),
    "mbpp": Suite("asserts", (("task_id",), ("text", "prompt"), ("test_list",)), _mbpp),
    "ifeval": Suite("ifeval", (("key",), ("prompt",), ("instruction_id_list",), ("kwargs",)), _ifeval),
    "simpleqa": Suite("eq", (("problem",), ("answer",)), _simpleqa),
}


def parts(source: str) -> tuple[Suite, str]:
    """(suite, path) of suite:NAME:PATH. Raises ValueError, one line."""
    name, _, path = source.removeprefix(PREFIX).partition(":")
    if name not in SUITES:
        raise ValueError(f"source {source!r}: no suite is called {name!r}; known: {', '.join(SUITES)}")
    if not path:
        raise ValueError(f"source {source!r}: expected suite:{name}:PATH, a file of the suite as it is published")
    return SUITES[name], path


def located(source: str) -> str:
    """`source` with its path made absolute, where it is one of a file that exists."""
    if not source.startswith(PREFIX):
        return source
    name, _, path = source.removeprefix(PREFIX).partition(":")
    return f"{PREFIX}{name}:{os.path.abspath(path)}" if path and os.path.exists(path) else source


def rows(suite: Suite, raws: Iterable[tuple[Any, str]]) -> list[Row]:
    """Rows of what a file's reader found, (object, file:line) each. Raises ValueError that begins with file:line."""
    made = []
    for raw, where in raws:
        if not isinstance(raw, dict):
            raise ValueError(f"{where}: the row is no object; expected one with {_listed(suite)}")
        for names in suite.fields:
            if not any(raw.get(name) is not None for name in names):
                raise ValueError(f"{where}: {' or '.join(names)} is missing; expected {_listed(suite)}")
        made.append(suite.row(raw, where))
    return made


def _listed(suite: Suite) -> str:
    return ", ".join(" or ".join(names) for names in suite.fields)
