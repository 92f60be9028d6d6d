"""The tools that come with the house: an exact calculator, and Python expressions in the sandbox."""

import ast
import operator
import re
from collections.abc import Callable
from decimal import Context, Decimal
from fractions import Fraction

from rubric import sandbox
from rubric.environments.tools import Tool

LENGTH = 300  # characters of an expression
BITS = 4096  # of a numerator or denominator
DIGITS = 12  # shown of what has no finite decimal form
PYTHON_WALL_S = 2.0

_WRITTEN = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "^": "**", "{": "(", "}": ")"})
_NO_NUMBER = re.compile(r"[0-9.](?![eE][+-]?[0-9])[A-Za-z_]")  # 1if, 0x1f: Python warns of some of these, reads others
_BINARY: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def calculate(expression: str) -> str:
    """The exact value of an arithmetic expression: 7/2 -> 3.5, 1/3 -> 1/3 (about 0.333333333333).

    Numbers are decimal and taken as written (0.1 + 0.2 is 0.3). + - * / // % ** with a whole exponent, parentheses,
    abs, min, max, round; ^ is the power, × ÷ − are read too. Raises ValueError, one line, for everything else and for
    what grows past BITS.
    """
    text = expression.strip().rstrip("=? ").translate(_WRITTEN)
    if not text or len(text) > LENGTH:
        raise ValueError("the expression is empty" if not text else f"the expression is over {LENGTH} characters")
    try:
        if _NO_NUMBER.search(text):
            raise SyntaxError
        tree = ast.parse(text, mode="eval")
        return _written(_value(tree.body, text))
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except (SyntaxError, MemoryError, RecursionError, OverflowError, TypeError):
        raise ValueError(f"cannot read {expression.strip()[:60]!r} as arithmetic") from None


def _value(node: ast.expr, text: str) -> Fraction:
    """Of a part of the expression `text`, from which numbers are read: a float would have lost digits."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        number = Decimal(ast.get_source_segment(text, node))
        if abs(number.adjusted()) > BITS // 4:
            raise ValueError("a number is too large")
        return Fraction(number)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, text)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _power(_value(node.left, text), _value(node.right, text))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _bounded(Fraction(_BINARY[type(node.op)](_value(node.left, text), _value(node.right, text))))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return _called(node.func.id, [_value(argument, text) for argument in node.args])
    raise ValueError("only numbers, + - * / // % **, parentheses, abs, min, max and round are allowed")


def _called(name: str, values: list[Fraction]) -> Fraction:
    if name in ("min", "max") and values:
        return (min if name == "min" else max)(values)
    if name == "abs" and len(values) == 1:
        return abs(values[0])
    if name == "round" and len(values) == 1:
        return Fraction(round(values[0]))
    if name == "round" and len(values) == 2 and values[1].denominator == 1 and abs(values[1]) <= 100:
        return round(values[0], int(values[1]))
    raise ValueError(f"cannot take {name[:20]} of {len(values)} values; there are abs, min, max and round")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("the exponent must be a whole number")
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) > BITS or size * abs(exponent) > BITS:
        raise ValueError("the result is too large")
    return base ** int(exponent)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS:
        raise ValueError("the result is too large")
    return value


def _written(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    rest, digits = value.denominator, 0
    while rest % 10 == 0 or rest % 5 == 0 or rest % 2 == 0:
        rest, digits = rest // (10 if rest % 10 == 0 else 5 if rest % 5 == 0 else 2), digits + 1
    if rest == 1 and digits <= 2 * DIGITS:
        scaled = abs(value.numerator) * 10**digits // value.denominator
        sign = "-" if value < 0 else ""
        return f"{sign}{scaled // 10**digits}.{scaled % 10**digits:0{digits}d}"
    about = Context(prec=DIGITS).divide(Decimal(value.numerator), Decimal(value.denominator))
    return f"{value} (about {about})"


def evaluate(expression: str) -> str:
    """repr of a Python expression's value, in the sandbox, with math, statistics, itertools, re and datetime at hand.

    Raises ValueError, one line, with the name of the exception or the limit it ran into.
    """
    program = (
        "import math, statistics, itertools, functools, collections, re, datetime, random\n"
        f"def evaluate():\n    return repr(eval({expression.strip()!r}, globals()))"
    )
    ran = sandbox.run([program], "evaluate", [[]], cpu_s=1, wall_s=PYTHON_WALL_S)
    if ran.failure:
        raise ValueError(ran.failure)
    if not ran.calls[0].returned:
        raise ValueError(str(ran.calls[0].value))
    return ran.calls[0].value


def _expression_tool(name: str, description: str, example: str, run: Callable[[str], str]) -> Tool:
    expression = {"type": "string", "description": example}
    parameters = {"type": "object", "properties": {"expression": expression}, "required": ["expression"]}
    return Tool(name, description, parameters, run)


BUILTIN = {
    tool.name: tool
    for tool in (
        _expression_tool("calculator", "Works out arithmetic exactly.", "such as (12 + 7) * 3", calculate),
        _expression_tool("python", "Evaluates one Python expression.", "such as sorted('banana')[0]", evaluate),
    )
}
