"""Grader of Python programs by published tests: assert statements, as HumanEval (2107.03374) and MBPP (2108.07732).

Tests and program run in processes of their own and exchange plain values (rubric/sandbox.py), so a test that hands the
function an iterator or another function, or expects its argument changed in place, is failed by every program.
"""

from rubric import sandbox
from rubric.reading import need, programs


def candidates(reply: str, entry: str, prefix: str) -> list[str]:
    """Programs that the reply may be: the rest of `prefix`, where its first line is indented, or one of its own.

    A program of its own still gets what stands in the prefix above the function asked for: imports and helpers.
    """
    own = [f"{_above(prefix, entry)}{program}" for program in programs(reply, entry)]
    first = next((line for line in reply.split("\n") if line.strip()), "")
    return [prefix + reply, *own] if prefix and first[:1] in (" ", "\t") else own


def _above(prefix: str, entry: str) -> str:
    for start in (f"\ndef {entry}(", f"\nasync def {entry}("):
        if start in prefix:
            return prefix[: prefix.index(start) + 1]
    return ""


def asserts(reply: str, answer: object, meta: dict) -> int:
    """meta = {"entry": name, "tests": [source, ...], "setup"?: source run first, "prefix"?: source to be continued}.

    4 no test raises and the reply is only code; 3 the same, but the code had to be taken from fences or prose; 2 at
    least one test does not raise; 1 else.
    """
    entry, tests = need(meta, "entry", "asserts"), need(meta, "tests", "asserts")
    prefix = meta.get("prefix") or ""
    setup = f"{_above(prefix, entry)}\n{meta.get('setup') or ''}"  # tests may use the prefix's helpers
    ran = sandbox.run_tests(candidates(reply, entry, prefix), entry, tests, setup)
    passed = [call.returned for call in ran.calls]
    if passed and all(passed):
        return 4 if ran.program == 0 else 3
    return 2 if any(passed) else 1
