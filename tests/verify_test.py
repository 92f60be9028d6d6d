"""Graders against grades worked out by hand from the four levels, and replies that try to get one for nothing."""

import time

import pytest

from rubric import verify
from rubric.constraints import CHECKS
from rubric.reading import normalised, programs
from rubric.verify import CHEAP, GRADERS

TOOLS = {
    "tools": [
        {"name": "add", "parameters": {"properties": {"a": {}, "b": {}}, "required": ["a", "b"]}},
        {"name": "weather", "parameters": {"properties": {"city": {}, "unit": {}}, "required": ["city"]}},
    ]
}
ADD = {"name": "add", "arguments": {"a": 1, "b": 2}}
DAYS = {"choices": ["Monday", "Tuesday", "Wednesday"]}
SHOUT = {
    "constraints": [
        {"kind": "uppercase"},
        {"kind": "contains", "word": "dog"},
        {"kind": "sentences", "n": 1},
        {"kind": "max_words", "n": 8},
    ]
}
MANY = " ".join(map(str, range(100)))

# (reply, answer, meta, grade)
CASES = {
    "eq": [
        ("Paris", "Paris", {}, 4),
        ("  Paris\n", "Paris", {}, 4),
        ("I think <answer>Rome</answer>, no: <answer> Paris </answer>.", "Paris", {}, 4),
        ("Lyon", ["Paris", "Lyon"], {}, 4),
        ('"PARIS".', "Paris", {}, 3),
        ("new\n  york", "New York", {}, 3),
        ("Ｐａｒｉｓ", "Paris", {}, 3),  # full-width letters: NFKC
        ("4312", "4321", {}, 2),  # two of four characters
        ("the red car", "the red cat", {}, 2),
        ("1234", "4321", {}, 1),  # no character in its place
        ("the car", "the red cat", {}, 1),
        ("", "Paris", {}, 1),
        ("Paris Rome Lyon Berlin", "Paris", {}, 1),
        ("<answer>Paris</answer> <answer>Rome</answer>", "Paris", {}, 1),  # the last one is the answer
        ("<answer>Paris", "Paris", {}, 1),
        ("-5", "5", {}, 1),
        ("5", ".5", {}, 1),
        (".5!", ".5", {}, 3),
        ("...", "?", {}, 1),  # nothing is left of either, and nothing is not equal to nothing
    ],
    "number": [
        ("19", "19", {}, 4),
        (" 19\n", "19", {}, 4),
        ("The answer is 19.", "19", {}, 3),
        ("19.0", "19", {}, 3),
        ("x = 19. So: 19", "19", {}, 3),
        ("$1,234.50", "1234.5", {}, 3),
        ("−7 degrees", "-7", {}, 3),
        ("1.9e1", "19", {}, 3),
        ("20", "19", {}, 2),
        ("12 + 7 = 19", "19", {}, 2),  # three numbers, the last is right
        ("-19", "19", {}, 2),
        ("12 + 7 = 20", "19", {}, 1),
        ("19 or 20", "19", {}, 1),
        ("nineteen", "19", {}, 1),
        ("", "19", {}, 1),
        (MANY, "19", {}, 1),
        (MANY, "99", {}, 2),
        (MANY.replace(" ", ","), "99", {}, 2),
        ("19x", "19", {}, 1),
        ("19.5.2", "19", {}, 1),
        ("5.7x", "5", {}, 1),
        ("1" * 5000, "1", {}, 2),
    ],
    "line": [
        ("Monday", "Monday", {}, 4),
        ("\n\nMonday\n", "Monday", {}, 4),
        ("monday.\nBecause it is.", "Monday", {}, 3),
        ("Monday\nBecause it is.", "Monday", {}, 3),
        ("Tuesday", "Monday", DAYS, 2),
        ("tuesday.\nMonday", "Monday", DAYS, 2),
        ("Tuesday", "Monday", {}, 1),
        ("Friday", "Monday", DAYS, 1),
        ("Monday Tuesday Wednesday", "Monday", DAYS, 1),
        ("It is\nMonday", "Monday", DAYS, 1),
        ("", "Monday", DAYS, 1),
        ("...", "Monday", {"choices": ["!"]}, 1),
    ],
    "list": [
        ("3, 5, 8", "3, 5, 8", {}, 4),
        ("[3, 5, 8]", "3, 5, 8", {}, 3),
        ("3 5 8", "3, 5, 8", {}, 3),
        ("3\n5\n8", "3, 5, 8", {}, 3),
        ("Sorted: 3,5,8.", "3, 5, 8", {}, 3),
        ('["b", "a"]', "b a", {"separator": " "}, 3),
        ("red car; blue car", "red car\nblue car", {"separator": "\n"}, 3),
        ("8, 5, 3", "3, 5, 8", {}, 2),  # all items, another order
        ("3, 5, 9", "3, 5, 8", {}, 2),  # two of three places
        ("3, 9, 9", "3, 5, 8", {}, 1),  # one of three
        ("3, 5", "3, 5, 8", {}, 1),
        ("3, 5, 8, 9", "3, 5, 8", {}, 1),
        ("3, 5, 8, 3, 5, 8", "3, 5, 8", {}, 1),
        (MANY, "3, 5, 8", {}, 1),
        ("4", "3", {}, 1),
        ("", "3", {}, 1),
    ],
    "json_call": [
        ('{"name": "add", "arguments": {"a": 1, "b": 2}}', ADD, TOOLS, 4),
        ('\n{"arguments":{"b":2,"a":1},"name":"add"} ', ADD, TOOLS, 4),
        ('<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>', ADD, TOOLS, 3),
        ('Sure:\n```json\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n```', ADD, TOOLS, 3),
        ('[{"name": "add", "arguments": {"a": 1, "b": 2}}]', ADD, TOOLS, 3),
        ('{"name": "add", "arguments": {"a": "1", "b": 2.0}}', ADD, TOOLS, 3),
        ('{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}', ADD, TOOLS, 3),
        (
            '{"name": "add", "arguments": {"a": "TRUE", "b": 2}}',
            {"name": "add", "arguments": {"a": True, "b": 2}},
            TOOLS,
            3,
        ),
        ('{"name": "add", "arguments": {"a": 1, "b": 3}}', ADD, TOOLS, 2),
        ('{"name": "add", "arguments": {"a": true, "b": 2}}', ADD, TOOLS, 2),  # true is not 1
        ('{"name": "weather", "arguments": {"city": "Rome"}}', ADD, TOOLS, 2),
        (
            '{"name": "add", "arguments": {"a": 1, "b": 2}} {"name": "add", "arguments": {"a": 1, "b": 3}}',
            ADD,
            TOOLS,
            2,
        ),
        ('{"name": "add", "arguments": {"a": 1, "b": 2}, "id": 7}', ADD, TOOLS, 2),
        ('{"name": "add", "arguments": {"a": 1}}', ADD, TOOLS, 1),  # b is required
        ('{"name": "weather", "arguments": {"city": "Rome", "day": 1}}', ADD, TOOLS, 1),
        ('{"name": "delete", "arguments": {}}', ADD, TOOLS, 1),
        ('{"name": ["add"], "arguments": {"a": 1, "b": 2}}', ADD, TOOLS, 1),
        ('{"name": "add", "arguments": {"a": 1, "b": 2}', ADD, TOOLS, 1),
        ('{"name": "add", "arguments": {"a": 1, "b": 2}} {"name": "delete", "arguments": {}}', ADD, TOOLS, 1),
        ("add(1, 2)", ADD, TOOLS, 1),
        ("", ADD, TOOLS, 1),
        ('{"a":' * 5000, ADD, TOOLS, 1),
    ],
    "constraints": [
        ("THE DOG RAN AWAY.", None, SHOUT, 4),
        (" THE DOG RAN AWAY ", None, SHOUT, 4),
        ('"THE DOG RAN AWAY."', None, {"constraints": [*SHOUT["constraints"], {"kind": "ends_with", "text": "."}]}, 3),
        ("THE DOG RAN AWAY.\n\nI hope this helps you!", None, SHOUT, 3),
        ("The dog ran away.", None, SHOUT, 2),  # three of four
        ("The dog ran away. It was late, and nobody saw it go.", None, SHOUT, 1),  # one of four
        ("A cat sat there. And it slept. And it woke up again.", None, SHOUT, 1),
        ("", None, SHOUT, 1),
        ("DOG", None, SHOUT, 1),
        ("DOG DOG DOG DOG", None, SHOUT, 1),
        ("A DOG A DOG A DOG", None, SHOUT, 1),
        ("A B C DOG D", None, SHOUT, 1),  # letters are no words
        ("DOG! DOG! THE DOG", None, SHOUT, 1),
        ("...", None, SHOUT, 1),
        ("WELL SAID", None, {"constraints": [{"kind": "uppercase"}, {"kind": "max_words", "n": 2}]}, 4),
        ("the sea is big. " * 20, None, {"constraints": [{"kind": "lowercase"}, {"kind": "min_words", "n": 40}]}, 1),
    ],
    "orz": [
        ("\\boxed{19}", "19", {}, 4),
        ("<answer>$19$</answer>", "19", {}, 4),
        ("so \\boxed{\\frac{6}{8}}", "\\frac{3}{4}", {}, 4),
        ("\\boxed{12 + 7 = 19}", "19", {}, 4),
        ("\\boxed{1+x^2}", "x^2+1", {}, 4),
        ("\\boxed{\\sqrt{12}}", "2\\sqrt{3}", {}, 4),
        ("\\boxed{1{,}000}", "1,000", {}, 4),
        ("\\boxed{2}", ["1", "2"], {}, 4),
        ("The answer is 19.", "19", {}, 3),
        ("x^2 + 1", "x^2+1", {}, 3),
        ("−7", "-7", {}, 3),
        ("\\boxed{20}", "19", {}, 2),
        ("\\boxed{19} or \\boxed{20}", "19", {}, 2),  # the last one is the answer
        ("\\boxed{19, 20}", "19", {}, 2),
        ("\\boxed{19 \\text{ or } 20}", "19", {}, 2),
        ("\\boxed{12+7}", "19", {}, 2),  # the question sent back
        ("12 + 7", "19", {}, 2),
        ("\\boxed{(3)(4)}", "12", {}, 2),
        ("\\boxed{3 4}", "12", {}, 2),
        ("\\boxed{38/2}", "19", {}, 2),
        ("\\boxed{\\int_0^{19} 1 dx}", "19", {}, 2),
        ("\\boxed{1/2 + 1/4}", "3/4", {}, 2),
        ("\\boxed{\\{1, 2, 3, 4\\}}", "3", {}, 2),
        ("I do not know", "19", {}, 1),
        ("", "19", {}, 1),
        ("\\boxed{}", "19", {}, 1),
    ],
}


@pytest.mark.parametrize("environment", CASES)
def test_grades_of_hand_worked_replies(environment):
    grader = GRADERS[environment]
    wrong = [
        f"{reply[:60]!r} for {answer!r}: {got}, not {grade}"
        for reply, answer, meta, grade in CASES[environment]
        if (got := grader(reply, answer, meta)) != grade
    ]
    assert not wrong, "\n".join(wrong)
    assert {case[3] for case in CASES[environment]} == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("environment", "answer", "meta", "message"),
    [
        ("eq", "", {}, "answer '' is empty"),
        ("eq", None, {}, "answer None is empty"),
        ("eq", ["a", ""], {}, "is empty"),
        ("number", "many", {}, "is not one decimal number"),
        ("number", ["1", "2"], {}, "is not one decimal number"),
        ("orz", "\\frac{", {}, "math-verify"),
        ("json_call", '{"name": "add"}', TOOLS, "is not a call"),
        ("json_call", ADD, {}, "meta.tools is missing"),
        ("constraints", None, {}, "meta.constraints is missing"),
        ("constraints", None, {"constraints": [{"kind": "upper_case"}]}, "did you mean 'uppercase'"),
        ("python_tests", None, {"entry": "f"}, "meta.tests is missing"),
        ("python_tests", None, {"tests": [{"args": [], "expect": 1}]}, "meta.entry is missing"),
    ],
)
def test_a_row_that_cannot_be_graded_raises(environment, answer, meta, message):
    with pytest.raises(ValueError, match=message):
        GRADERS[environment]("a reply", answer, meta)


def test_every_constraint_tells_right_from_wrong():
    cases = {
        "uppercase": ({}, "NO 7 SINGS", "No"),
        "lowercase": ({}, "no 7 sings", "No"),
        "no_commas": ({}, "one; two", "one, two"),
        "no_digits": ({}, "one", "1"),
        "contains": ({"word": "dog"}, "A Dog.", "A dogma"),
        "excludes": ({"word": "dog"}, "A dogma", "A Dog."),
        "sentences": ({"n": 2}, 'He said "Go." And 3.5 went', "One. Two. Three"),
        "max_words": ({"n": 3}, "it's a well-known", "one two three four"),
        "min_words": ({"n": 4}, "one two three four", "it's a well-known"),
        "starts_with": ({"text": "Dear"}, "Dear me", "Oh dear"),
        "ends_with": ({"text": "end."}, "the end.", "the end. Or not"),
    }
    assert cases.keys() == CHECKS.keys()
    for kind, (want, holds, fails) in cases.items():
        assert CHECKS[kind](holds, want), kind
        assert not CHECKS[kind](fails, want), kind


def test_normalising_keeps_what_changes_the_meaning():
    assert normalised(' "Hello,  World!" ') == "hello, world"
    texts = ["-5", "5", "+5", ".5", "5%", "$5", "<", ">", "c#", "c++", "c"]
    assert len(set(map(normalised, texts))) == len(texts)


def test_the_code_is_found_in_fences_and_in_prose():
    code = "def f(x):\n    return x"
    assert programs(code, "f") == [code, code]
    assert programs(f"Here:\n```python\n{code}\n```\nBye", "f")[1] == code + "\n"
    assert programs(f"```\nprint(1)\n```\n```py\n{code}\n```\n```\nprint(2)\n```", "f")[1] == code + "\n"
    assert programs(f"Here it is:\n\n{code}\n\nIt returns x.", "f")[1] == code
    assert programs("I cannot.", "f") == ["I cannot."]


def test_python_tests_has_four_levels():
    meta = {"entry": "inc", "tests": [{"args": [1], "expect": 2}, {"args": [-1], "expect": 0}]}
    code = "def inc(n):\n    return n + 1"

    def grade(reply):
        return verify.python_tests(reply, None, meta)

    assert grade(code) == 4
    assert grade(f"```python\n{code}\n```") == 3
    assert grade(f"Here you are:\n{code}\nThat was easy.") == 3
    assert grade("def inc(n):\n    return 2") == 2  # one test of two
    assert grade("def inc(n):\n    return 'two'") == 2  # it runs
    assert grade("def inc(n):\n    return m + 1") == 1
    assert grade("def dec(n):\n    return n - 1") == 1
    assert grade("the successor of n") == 1


def test_returned_values_compare_as_in_python():
    cases = [
        ([1, 2], (1, 2), True),  # tuples come back as lists
        ({"1": [0.1]}, {1: (0.1,)}, True),
        (0.1 + 0.2, 0.3, True),
        (1, 1.0, True),
        (0.3001, 0.3, False),
        ("1", 1, False),
        ([1], [1, 2], False),
        (10**400, 1.5, False),
        (None, 0, False),
    ]
    for value, expect, equal in cases:
        assert verify._returned(value, expect) == equal, (value, expect)


@pytest.mark.parametrize("environment", sorted(CHEAP))
def test_graders_that_run_in_the_trainer_take_linear_time(environment):
    _, answer, meta, _ = CASES[environment][0]
    for seed in ("1", "a", " ", ".", ",", "1,111", "{", '{"a":', "[", '"', "<answer>", "-1 ", "!? ", "a-", "e1", "\n"):
        start = time.perf_counter()
        GRADERS[environment](seed * (40_000 // len(seed)), answer, meta)
        assert time.perf_counter() - start < 1.0, repr(seed)  # quadratic time takes many seconds
