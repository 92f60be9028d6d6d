"""Checks of model-written Python: the share of unit tests passed, and whether the reply is only a program."""

import ast

from rubric.verify import tests_passed

Found = tuple[float, dict[str, float]]


def code_tests(reply: str, answer: object, meta: dict, options: dict) -> Found:
    """The share of meta["tests"] passed, each {"args", "expect"}; rows as the grader python_tests reads them."""
    passed = tests_passed(reply, meta).passed
    share = sum(passed) / len(passed)
    return share, {"tests_passed": share, "all_passed": float(share == 1.0)}


def code_only(reply: str, answer: object, meta: dict, options: dict) -> Found:
    """1 for a program and nothing else, 1/2 for one fenced block and nothing else, 0 for anything that does not parse.

    A comment in the program is part of it.
    """
    text = reply.strip()
    if _parses(text):
        return 1.0, {}
    parts = text.split("```")
    fenced = len(parts) == 3 and not parts[0].strip() and not parts[2].strip()
    return (0.5 if fenced and _parses(parts[1].partition("\n")[2]) else 0.0), {}


def _parses(text: str) -> bool:
    try:
        return bool(ast.parse(text).body)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
