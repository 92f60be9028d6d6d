"""Function calling: calls in both forms, what is wrong with them, results in order, and the two built-in tools."""

from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rubric.environments.builtin_tools import BUILTIN, calculate, evaluate
from rubric.environments.tools import MOST_CALLS, RESULT_CHARACTERS, Tool, ToolEnvironment, calls, declared

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city"],
}
WEATHER = Tool("weather", "", SCHEMA, lambda city, days=1: f"{city} {days}")
DECLARED = {"name": "alarm", "parameters": {"type": "object", "properties": {"time": {"type": "string"}}}}
TOOLS = {"weather": WEATHER, "calculator": BUILTIN["calculator"]}


def hermes(text: str) -> str:
    return f"<tool_call>\n{text}\n</tool_call>"


def results(environment: ToolEnvironment, reply: str) -> list[str]:
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": reply}]
    turns = environment.interact(said)
    assert all(set(turn) == {"role", "content"} and turn["role"] == "tool" for turn in turns)
    return [turn["content"] for turn in turns]


ENVIRONMENT = ToolEnvironment([*TOOLS.values()], "number", BUILTIN)


@pytest.mark.parametrize(
    "reply, expected",
    [
        ("The answer is 42.", []),
        ("a <b>c</b> tool_call {}", []),
        (hermes('{"name": "weather", "arguments": {"city": "Oslo"}}'), ["Oslo 1"]),
        (hermes('{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}') + " so", ["Oslo 3"]),
        (hermes('{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}'), ["Oslo 1"]),
        ('<tool name="weather">{"city": "Oslo", "days": 2}</tool>', ["Oslo 2"]),
        ('<tool name="weather">Oslo</tool>', ["Oslo 1"]),  # the only required argument is a text
        ("<tool name='calculator'>6 * 7</tool>", ["42"]),
        ('<tool name="calculator">6</tool>', ["6"]),  # JSON, but no object
        (
            "first " + hermes('{"name": "calculator", "arguments": {"expression": "1+1"}}') + " then "
            '<tool name="calculator">2+2</tool>' + hermes("{}") + '<tool name="weather">Rome</tool>',
            ["2", "4", 'error: expected {"name": ..., "arguments": {...}} in <tool_call>', "Rome 1"],
        ),
        (f"<think>{hermes('{}')}</think>" + hermes('{"name": "weather", "arguments": {"city": "B"}}'), ["B 1"]),
        (f"<think>I could call {hermes('{}')}</think> 42", []),
    ],
)  # fmt: skip
def test_calls_and_their_results_in_order(reply, expected):
    assert results(ENVIRONMENT, reply) == expected


@pytest.mark.parametrize(
    "reply, error",
    [
        ("<tool_call>", "error: <tool_call> without </tool_call>"),
        ('<tool_call>{"name": "weather"', "error: <tool_call> without </tool_call>"),
        ('<tool name="weather">Oslo', "error: <tool name=...> without </tool>"),
        ('<tool name="weather', "error: <tool name=...> without </tool>"),
        (hermes("{'name': 'weather'}"), "is not JSON: Expecting property name"),
        (hermes("[" * 100_000), "is not JSON"),
        (hermes('["weather"]'), 'expected {"name": ..., "arguments": {...}}'),
        (hermes('{"name": 3, "arguments": {}}'), 'expected {"name": ..., "arguments": {...}}'),
        (hermes('{"name": "wether", "arguments": {}}'), "no tool is named 'wether'; there is weather, calculator"),
        (hermes('{"name": "weather", "arguments": [1]}'), "the arguments of weather are no JSON object"),
        (hermes('{"name": "weather", "arguments": "Oslo"}'), "the arguments of weather are no JSON object"),
        (hermes('{"name": "weather"}'), "weather: 'city' is a required property"),
        (hermes('{"name": "weather", "arguments": {"city": 7}}'), "weather: city: 7 is not of type 'string'"),
        (hermes('{"name": "weather", "arguments": {"city": "", "days": 0}}'), "days: 0 is less than the minimum of 1"),
        (hermes('{"name": "weather", "arguments": {"city": "", "day": 1}}'), "no argument 'day'; it has city, days"),
        ('<tool name="calculator">1 +</tool>', "error: cannot read '1 +' as arithmetic"),
        ('<tool name="x">1</tool>', "no tool is named 'x'"),
    ],
)
def test_what_is_wrong_with_a_call_comes_back(reply, error):
    (content,) = results(ENVIRONMENT, reply)
    assert content.startswith("error: ") and error in content and "\n" not in content and len(content) < 300


@given(
    st.lists(st.sampled_from(["<tool_call>", "</tool_call>", '<tool name="', '">', "</tool>", "{", '"', "a"])).map(
        "".join
    )
)
def test_any_reply_is_read(reply):
    assert all(call.error or call.name in TOOLS for call in calls(reply, TOOLS))
    results(ENVIRONMENT, reply)


def test_calls_and_results_are_bounded():
    one = '<tool name="weather">x</tool>'
    found = results(ENVIRONMENT, one * 50)
    assert found[:-1] == ["x 1"] * MOST_CALLS and "more than 8 calls" in found[-1]
    long = results(ENVIRONMENT, f'<tool name="weather">{"x" * 5000}</tool>')[0]
    assert long == "x" * RESULT_CHARACTERS + " (cut)"


def test_a_declared_tool_is_the_answer_when_called_alone():
    row = {"tools": [DECLARED], "answer": {"name": "alarm", "arguments": {"time": "7"}}, "meta": {"tools": [DECLARED]}}
    environment = ToolEnvironment([], "json_call", BUILTIN).of_row(row)
    call = hermes('{"name": "alarm", "arguments": {"time": "7"}}')
    assert results(environment, call) == []
    assert environment.grade([{"role": "assistant", "content": call}], row["answer"]) == 3.0
    assert "has no argument 'at'" in results(environment, hermes('{"name": "alarm", "arguments": {"at": "7"}}'))[0]
    both = ToolEnvironment([*declared([DECLARED], ""), BUILTIN["calculator"]], "number", BUILTIN)
    assert results(both, f'{call}<tool name="calculator">1</tool>') == [
        "error: alarm gives no result here; call it alone, as your answer", "1",
    ]  # fmt: skip


def test_a_row_replaces_the_tools_of_its_domain_and_finds_the_built_in_ones():
    calculator = {
        "type": "function",
        "function": {"name": "calculator", "parameters": BUILTIN["calculator"].parameters},
    }
    environment = ENVIRONMENT.of_row({"tools": [calculator], "answer": "4"})
    assert [tool["function"]["name"] for tool in environment.tools] == ["calculator"]
    assert results(environment, '<tool name="calculator">2+2</tool>') == ["4"]
    assert "no tool is named 'weather'" in results(environment, '<tool name="weather">x</tool>')[0]
    assert ENVIRONMENT.of_row({"answer": "4"}).tools == ENVIRONMENT.tools


def test_the_answer_is_graded_and_a_call_is_none():
    said = [{"role": "user", "content": "6*7?"}]
    assert ENVIRONMENT.grade([*said, {"role": "assistant", "content": "42"}], "42") == 4
    assert ENVIRONMENT.grade([*said, {"role": "assistant", "content": "It is 42."}], "42") == 3
    cut_off = {"role": "assistant", "content": '<tool name="calculator">42</tool>'}
    assert ENVIRONMENT.grade([*said, cut_off], "42") == 1


@pytest.mark.parametrize(
    "schemas, reason",
    [
        ({"name": "x"}, "expected a list of JSON schemas"),
        (["x"], r"tools\[0\] has no name"),
        ([{"function": {"name": ""}}], r"tools\[0\] has no name"),
        (
            [DECLARED, {"name": "y", "parameters": {"type": "objekt"}}],
            r"tools\[1\].parameters is no JSON schema: 'objekt'",
        ),
        ([DECLARED, DECLARED], "two tools are named 'alarm'"),
    ],
)
def test_wrong_declarations_are_one_line(schemas, reason):
    with pytest.raises(ValueError, match=reason) as error:
        declared(schemas, "row 3")
    assert str(error.value).startswith("row 3: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "expression, value",
    [
        ("1 + 2 * 3", "7"),
        ("7/2", "3.5"),
        ("0.1 + 0.2", "0.3"),
        ("1/3", "1/3 (about 0.333333333333)"),
        ("-2/3", "-2/3 (about -0.666666666667)"),
        ("-1/8", "-0.125"),
        ("2^10 = ?", "1024"),
        ("2**-2", "0.25"),
        ("12 × 7 ÷ 2 − 1", "41"),
        ("7 // 2 + 7 % 4", "6"),
        ("-(3 - 5)", "2"),
        ("max(1, 2, 3) - min(4, 5) + abs(-1.5)", "0.5"),
        ("round(2.567, 2) + round(1.4)", "3.57"),
        ("1e3", "1000"),
        ("0.1234567890123456789 * 10", "1.234567890123456789"),
    ],
)
def test_calculator_by_hand(expression, value):
    assert calculate(expression) == value


NUMBERS = st.decimals(-1000, 1000, places=3, allow_nan=False, allow_infinity=False)


@given(NUMBERS, NUMBERS, st.sampled_from("+-*"))
def test_calculator_agrees_with_decimal(a, b, sign):
    with localcontext() as context:
        context.prec = 50
        right = {"+": a + b, "-": a - b, "*": a * b}[sign]
        assert Decimal(calculate(f"({a}) {sign} ({b})")) == right


@given(st.integers(-(10**6), 10**6), st.integers(1, 10**4))
def test_calculator_divides_exactly(a, b):
    text = calculate(f"{a} / {b}")
    assert Fraction(text.split(" ")[0]) == Fraction(a, b)


@pytest.mark.parametrize(
    "expression",
    [
        "", "   ", "1 +", "x + 1",
        "1_000", "__import__('os')", "(1).real", "[1][0]", "1 if 1 else 2", "'a' * 3", "True + 1",
        "9**9**9**9", "2 ** 100000", "10**4000 * 10**4000", "1e99999999", "1/0", "0 ** -1", "5 % 0", "1 << 70", "0x1f",
        "1if 2else 3", "1j", "abs()", "abs(1, 2)", "max()", "round(1, 1.5)", "round(1, 10**6)", "pow(2, 3)", "abs(x=1)",
        "0.5 ** 0.5", "(" * 290, "-" * 290, "1;2", "1\n2", "a" * 301, "lambda: 1", "1 and 2", "~1", "1 < 2", "1..real",
    ],
)  # fmt: skip
def test_calculator_refuses_in_one_line(expression):
    with pytest.raises(ValueError) as error:
        calculate(expression)
    assert "\n" not in str(error.value) and len(str(error.value)) < 120


@given(st.text("0123456789.eE+-*/%() ^,maxinbsroud_", max_size=40))
def test_calculator_raises_nothing_else(expression):
    try:
        assert isinstance(calculate(expression), str)
    except ValueError:
        pass


def test_python_expressions():
    assert evaluate("sorted('banana')[0]") == "'a'"
    assert evaluate(" math.comb(5, 2) + statistics.mean([1, 2, 3])") == "12"
    assert evaluate("{1, 2} | {3}") == "{1, 2, 3}"
    for expression, reason in {"1 +": "SyntaxError", "import os": "SyntaxError", "1/0": "ZeroDivisionError"}.items():
        with pytest.raises(ValueError, match=reason):
            evaluate(expression)
    with pytest.raises(ValueError, match="PermissionError"):
        evaluate("open('/etc/passwd').read()")
