"""The two code domains of bench12: write a one-line Python function, and say what a short program prints.

`code_write` fills the parameters of over seventy descriptions; its unit tests are the reference's own results on inputs
chosen at and around the parameters, so that `>` and `>=` differ. `code_output` has a template for each idea of a short
program and computes the output from the parameters, without running the program; case and punctuation never decide,
since the grader `eq` passes over them.
"""

import functools
import string
from typing import Any

import numpy as np

from curriculum.few_shot import WORDS, Task

# Parameters: k, j whole numbers; i a short length; c, d letters; w a word.
INT = {  # f(x)
    "x plus {k}": "x + {k}",
    "x minus {k}": "x - {k}",
    "{k} minus x": "{k} - x",
    "x times {k}": "x * {k}",
    "the remainder of x divided by {k}": "x % {k}",
    "x divided by {k}, rounded down": "x // {k}",
    "x to the power of {i}": "x ** {i}",
    "x squared plus {k}": "x ** 2 + {k}",
    "x times {k}, plus {j}": "x * {k} + {j}",
    "x times {k}, minus {j}": "x * {k} - {j}",
    "the sum of x and {k}, times {j}": "(x + {k}) * {j}",
    "the absolute value of x": "abs(x)",
    "the absolute value of x minus {k}": "abs(x - {k})",
    "the larger of x and {k}": "max(x, {k})",
    "the smaller of x and {k}": "min(x, {k})",
    "True if x is greater than {k}, else False": "x > {k}",
    "True if x is less than {k}, else False": "x < {k}",
    "True if x is equal to {k}, else False": "x == {k}",
    "True if x is not equal to {k}, else False": "x != {k}",
    "True if x is divisible by {k}, else False": "x % {k} == 0",
    "True if x is even, else False": "x % 2 == 0",
    "True if x is odd, else False": "x % 2 == 1",
    "x with the opposite sign": "-x",
    "x as a string": "str(x)",
    "the list of the whole numbers from 0 to x - 1": "list(range(x))",
    "a list with x in it {i} times": "[x] * {i}",
}
PAIR = {  # f(a, b)
    "a plus b": "a + b",
    "a times b": "a * b",
    "a minus b": "a - b",
    "the larger of a and b": "max(a, b)",
    "the smaller of a and b": "min(a, b)",
    "a plus b plus {k}": "a + b + {k}",
    "a times b plus {k}": "a * b + {k}",
    "a plus b, times {k}": "(a + b) * {k}",
    "a plus {k} times b": "a + {k} * b",
    "True if a is greater than b, else False": "a > b",
    "True if a plus b is greater than {k}, else False": "a + b > {k}",
}
TEXT = {  # f(s)
    "the string s in upper case": "s.upper()",
    "the string s in lower case": "s.lower()",
    "the string s reversed": "s[::-1]",
    "the length of the string s": "len(s)",
    "the length of the string s plus {k}": "len(s) + {k}",
    "the first character of the string s": "s[0]",
    "the last character of the string s": "s[-1]",
    "the first {i} characters of the string s": "s[:{i}]",
    "the last {i} characters of the string s": "s[-{i}:]",
    "the string s without its first {i} characters": "s[{i}:]",
    "the string s repeated {k} times": "s * {k}",
    "the string s followed by '{w}'": "s + '{w}'",
    "'{w}' followed by the string s": "'{w}' + s",
    "how often '{c}' occurs in the string s": "s.count('{c}')",
    "the string s with every '{c}' replaced by '{d}'": "s.replace('{c}', '{d}')",
    "True if the string s contains '{c}', else False": "'{c}' in s",
    "True if the string s starts with '{c}', else False": "s.startswith('{c}')",
    "True if the string s ends with '{c}', else False": "s.endswith('{c}')",
    "True if the string s is longer than {i} characters, else False": "len(s) > {i}",
    "the list of the words in the string s": "s.split()",
}
LIST = {  # f(xs)
    "the sum of the list xs": "sum(xs)",
    "the length of the list xs": "len(xs)",
    "the largest element of the list xs": "max(xs)",
    "the smallest element of the list xs": "min(xs)",
    "the first element of the list xs": "xs[0]",
    "the last element of the list xs": "xs[-1]",
    "the list xs in ascending order": "sorted(xs)",
    "the list xs reversed": "xs[::-1]",
    "the first {i} elements of the list xs": "xs[:{i}]",
    "the sum of the list xs plus {k}": "sum(xs) + {k}",
    "the list xs with {k} added at its end": "xs + [{k}]",
    "the list xs with every element plus {k}": "[x + {k} for x in xs]",
    "the list xs with every element times {k}": "[x * {k} for x in xs]",
    "the elements of the list xs that are greater than {k}": "[x for x in xs if x > {k}]",
    "the elements of the list xs that are less than {k}": "[x for x in xs if x < {k}]",
    "how often {k} occurs in the list xs": "xs.count({k})",
    "True if {k} is in the list xs, else False": "{k} in xs",
}
FUNCTIONS = [
    (arguments, text, expression)
    for arguments, table in (("x", INT), ("a, b", PAIR), ("s", TEXT), ("xs", LIST))
    for text, expression in table.items()
]


def code_write(rng: np.random.Generator, difficulty: int) -> Task:
    """One line of Python, graded by unit tests; parameters up to 20 at level 1, up to ten times that at each next."""
    arguments, text, expression = FUNCTIONS[rng.integers(len(FUNCTIONS))]
    wanted = [name for _, name, _, _ in string.Formatter().parse(text) if name]
    first, second = rng.permutation(26)[:2]
    drawn = {
        "k": lambda: int(rng.integers(2, 2 * 10**difficulty + 1)),
        "j": lambda: int(rng.integers(2, 2 * 10**difficulty + 1)),
        "i": lambda: int(rng.integers(2, 5)),
        "c": lambda: string.ascii_lowercase[first],
        "d": lambda: string.ascii_lowercase[second],
        "w": lambda: WORDS[rng.integers(len(WORDS))],
    }
    return _write(arguments, text, expression, tuple((name, drawn[name]()) for name in wanted))


@functools.cache
def _write(arguments: str, text: str, expression: str, parameters: tuple[tuple[str, Any], ...]) -> Task:
    values = dict(parameters)
    body = expression.format(**values)
    reference = eval(f"lambda {arguments}: {body}")  # a template of this file
    tests = [{"args": args, "expect": reference(*args)} for args in _inputs(arguments, **values)]
    return Task(
        question=f"Write a one-line Python function f({arguments}) that returns {text.format(**values)}.",
        reply=f"def f({arguments}): return {body}",
        meta={"entry": "f", "tests": tests},
        key=f"code_write: f({arguments}) returns {text.format(**values)}",
    )


def _inputs(arguments: str, k: int = 9, c: str = "a", **others: Any) -> list[list]:
    """Arguments at and around k, and with c first, last and absent."""
    if arguments == "x":
        return [[x] for x in (-3, 0, 1, 2, 7, k - 1, k, k + 1, 2 * k)]
    if arguments == "a, b":
        return [[1, 2], [9, 4], [6, 6], [k, 0], [k, 1], [0, k - 1]]
    if arguments == "s":
        return [["banana"], ["Hello World"], [f"{c}pq{c}"], [f"xy{c}z"], ["cup"]]
    return [[[3, 1, 2]], [[10, 25, 4, 7, 7]], [[5]], [[k, k + 1, k - 1, k, 1]]]


def code_output(rng: np.random.Generator, difficulty: int) -> Task:
    """What a short program prints: one easy operation on a value; level 2 any; level 3 loops, calls and branches."""
    templates = (EASY, SHORT, LONG)[difficulty - 1]
    program, output = templates[rng.integers(len(templates))](rng)
    return Task(
        question=f"What does this Python program print?\n{program}",
        reply=output,
        meta={},
        key=f"code_output: {program}",
    )


def _number(rng: np.random.Generator, most: int = 9) -> int:
    return int(rng.integers(1, most + 1))


def _word(rng: np.random.Generator) -> str:
    return WORDS[rng.integers(len(WORDS))]


def _variable(rng: np.random.Generator) -> tuple[str, str]:
    values = [str(_number(rng, 99)), f"'{_word(rng)}'"]
    first, second = rng.permutation(2)
    asked = rng.integers(2)
    return f"a = {values[first]}\nb = {values[second]}\nprint({'ab'[asked]})", values[(first, second)[asked]].strip("'")


def _plus_minus(rng: np.random.Generator) -> tuple[str, str]:
    a, b, kind = _number(rng), _number(rng), rng.integers(2)
    sign, result = (("+", a + b), ("-", a - b))[kind]
    return f"x = {a}\nprint(x {sign} {b})", str(result)


def _joined(rng: np.random.Generator) -> tuple[str, str]:
    first, second, kind = _word(rng), _word(rng), rng.integers(2)
    call, result = [(f"s + '{second}'", first + second), ("s * 2", first * 2)][kind]
    return f"s = '{first}'\nprint({call})", result


def _longer(rng: np.random.Generator) -> tuple[str, str]:
    xs, k, kind = [_number(rng) for _ in range(3)], _number(rng), rng.integers(3)
    call, result = [(f"xs + [{k}]", [*xs, k]), ("len(xs)", len(xs)), ("xs[0]", xs[0])][kind]
    return f"xs = {xs}\nprint({call})", str(result)


def _arithmetic(rng: np.random.Generator) -> tuple[str, str]:
    a, b, kind = _number(rng, 20), _number(rng), rng.integers(5)
    sign, result = [("+", a + b), ("-", a - b), ("*", a * b), ("//", a // b), ("%", a % b)][kind]
    return f"x = {a}\nprint(x {sign} {b})", str(result)


def _two_names(rng: np.random.Generator) -> tuple[str, str]:
    a, b = _number(rng), _number(rng)
    return f"x = {a}\ny = x + {b}\nprint(x + y)", str(a + a + b)


def _comparison(rng: np.random.Generator) -> tuple[str, str]:
    a, b = _number(rng, 20), _number(rng, 20)
    return f"x = {a}\nprint(x > {b})", str(a > b)


def _text(rng: np.random.Generator) -> tuple[str, str]:
    word, k, kind = _word(rng), int(rng.integers(2, 4)), rng.integers(5)
    call, result = [
        ("len(s)", str(len(word))),
        (f"s[:{k}]", word[:k]),
        ("s[0]", word[0]),
        (f"s * {k}", word * k),
        ("s[-1]", word[-1]),
    ][kind]
    return f"s = '{word}'\nprint({call})", result


def _items(rng: np.random.Generator) -> tuple[str, str]:
    xs, k, kind = [_number(rng) for _ in range(3)], _number(rng), rng.integers(7)
    call, result = [
        ("len(xs)", len(xs)),
        ("sum(xs)", sum(xs)),
        ("max(xs)", max(xs)),
        ("xs[1]", xs[1]),
        (f"xs + [{k}]", [*xs, k]),
        ("sorted(xs)", sorted(xs)),
        ("xs[::-1]", xs[::-1]),
    ][kind]
    return f"xs = {xs}\nprint({call})", str(result)


def _loop(rng: np.random.Generator) -> tuple[str, str]:
    start, times, step = _number(rng), int(rng.integers(2, 5)), _number(rng)
    return f"x = {start}\nfor i in range({times}):\n    x = x + {step}\nprint(x)", str(start + times * step)


def _function(rng: np.random.Generator) -> tuple[str, str]:
    a, b, c = _number(rng), _number(rng), _number(rng)
    return f"def f(x):\n    return x * {a} + {b}\nprint(f({c}))", str(c * a + b)


def _branch(rng: np.random.Generator) -> tuple[str, str]:
    x, limit, high, low = _number(rng, 20), _number(rng, 20), _word(rng), _word(rng)
    program = f"x = {x}\nif x > {limit}:\n    print('{high}')\nelse:\n    print('{low}')"
    return program, high if x > limit else low


def _comprehension(rng: np.random.Generator) -> tuple[str, str]:
    xs, k = [_number(rng) for _ in range(3)], _number(rng)
    return f"xs = {xs}\nprint([x + {k} for x in xs])", str([x + k for x in xs])


def _dictionary(rng: np.random.Generator) -> tuple[str, str]:
    first, second = (WORDS[i] for i in rng.permutation(len(WORDS))[:2])
    a, b, asked = _number(rng), _number(rng), rng.integers(2)
    program = f"d = {{'{first}': {a}, '{second}': {b}}}\nprint(d['{(first, second)[asked]}'])"
    return program, str((a, b)[asked])


EASY = (_variable, _plus_minus, _comparison, _joined, _longer)
SHORT = (_arithmetic, _two_names, _comparison, _text, _items)
LONG = (_loop, _function, _branch, _comprehension, _dictionary)
