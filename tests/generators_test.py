"""Generated rows against solvers that read the prompt again, and the promises of the split."""

import ast
import contextlib
import io
import json
import re
from collections import Counter

import numpy as np
import pytest

from curriculum import code_tasks, generators
from curriculum.bench import TOOLS
from curriculum.few_shot import WORDS
from curriculum.generators import TINY
from curriculum.sources import GENERATORS, read, read_levels
from curriculum.sources import levels as levels_of
from rubric.verify import GRADERS

BENCH12 = (
    "gcd products sums compare sort_numbers filter_numbers kth_letter weekday code_write code_output tool_call capitals"
).split()
WEEK = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


def levels(name: str) -> list[int]:
    return sorted({1, 2, GENERATORS[name].levels})


FINAL = {"calculator,show=no": "number"}  # by environment of several turns, what grades its last one
CASES = [(name, level) for name in GENERATORS for level in levels(name)]


def sample(name: str, level: int, split: str = "train", size: int = 40, seed: int = 0) -> list[dict]:
    return generators.rows(name, GENERATORS[name], difficulty=level, split=split, size=size, seed=seed)


def question(row: dict) -> str:
    return row["messages"][-1]["content"]


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def gcd(a: int, b: int) -> int:
    return max(d for d in range(1, min(a, b) + 1) if a % d == b % d == 0)


def after(text: str) -> str:
    return text.split(": ", 1)[1]


def shifted(text: str) -> str:
    by, letters = int(text.split(":")[0].split()[1]), after(text).split()
    return " ".join(chr((ord(letter) - 97 + by) % 26 + 97) for letter in letters)


def filtered(text: str) -> str:
    _, limit, *given = [text, *numbers(text)]
    return ", ".join(str(n) for n in given if (n > limit if "larger" in text else n < limit))


def letter(text: str) -> str:
    word, (k,) = re.search(r"'(\w+)'", text)[1], numbers(text)
    return (word[::-1] if "from the end" in text else word)[k - 1]


def printed(text: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(text.split("\n", 1)[1], {})
    return output.getvalue().rstrip("\n")


# name -> the answer, computed from the last message alone
SOLVERS = {
    "copy": after,
    "largest": lambda text: str(sorted(numbers(text))[-1]),
    "reverse": lambda text: after(text)[::-1],
    "sort": lambda text: " ".join(map(str, sorted(numbers(text)))),
    "lookup": lambda text: after(text)[after(text).index(text[4]) + 1],
    "add": lambda text: str(eval(after(text))),
    "shift": shifted,
    "count": lambda text: str(after(text).count(text[6])),
    "gcd": lambda text: str(gcd(*numbers(text))),
    "products": lambda text: str(eval(re.search(r"[\d *]+(?=\.)", text)[0].strip())),
    "sums": lambda text: str(eval(re.search(r": (.*) =", text)[1])),
    "compare": lambda text: str((max if "largest" in text else min)(numbers(text))),
    "sort_numbers": lambda text: ", ".join(map(str, sorted(numbers(text)))),
    "filter_numbers": filtered,
    "kth_letter": letter,
    "weekday": lambda text: (WEEK * 60)[WEEK.index(re.search(r"is (\w+)\.", text)[1]) + numbers(text)[0]],
    "code_output": printed,
    "spell_backwards": lambda text: "".join(reversed(re.search(r"'(\w+)'", text)[1])),
    "acronym": lambda text: "".join(word[0] for word in after(text)[:-1].split()).upper(),
}


@pytest.mark.parametrize("name,level", [case for case in CASES if case[0] in SOLVERS])
def test_answers_are_those_of_a_solver_that_reads_the_prompt(name, level):
    for row in sample(name, level):
        assert row["answer"] == SOLVERS[name](question(row)), question(row)


def test_worked_examples():
    assert SOLVERS["shift"]("shift 2: b x z") == "d z b"
    assert SOLVERS["filter_numbers"]("Keep the numbers larger than 20 in this list: 5, 31, 20, 40.") == "31, 40"
    rng = np.random.default_rng(0)
    rows = {name: TINY[name].draw(rng, 2) for name in TINY}
    assert {name: row["key"] for name, row in rows.items()}.keys() == TINY.keys()
    assert generators.side("gcd [4, 6]") == generators.side("gcd [4, 6]") in ("train", "test")


@pytest.mark.parametrize("name,level", CASES)
def test_rows_are_well_formed_and_their_examples_solved(name, level):
    """Every assistant turn is what the domain's own grader gives 4; so is the row's own answer, written out."""
    environment = GENERATORS[name].environment
    grader = GRADERS[FINAL.get(environment, environment)]
    for row in sample(name, level, size=10):
        assert row.keys() == {"messages", "answer", "meta", "key"} and json.loads(json.dumps(row)) == row
        roles = [message["role"] for message in row["messages"]]
        turns = ["user", "assistant"] if environment in GRADERS else ["user", "assistant", "tool", "assistant"]
        shots = turns * 3 + ["user"]
        assert roles[-1] == "user" and (roles == ["user"] or roles[-len(shots) :] == shots)
        reply = row["answer"] if isinstance(row["answer"], str) else json.dumps(row["answer"])
        if environment != "python_tests":  # starts a process a reply: the tests below
            assert grader(reply, row["answer"], row["meta"]) == 4
            assert grader("no idea, sorry", row["answer"], row["meta"]) < 3


@pytest.mark.parametrize("name,level", CASES)
def test_train_and_test_share_no_key_and_no_text(name, level):
    """Also for other sizes and seeds of the two sources; level 1 spaces are small enough to be exhausted."""
    train, test = sample(name, level, "train", 1500), sample(name, level, "test", 300, seed=7)
    for what in (question, lambda row: row["key"]):
        seen = [what(row) for row in train], [what(row) for row in test]
        assert not set(seen[0]) & set(seen[1])
        assert all(len(set(side)) == len(side) for side in seen)
    for row in (*train[:1], *test[:1]):
        shown = {message["content"] for message in row["messages"][:-1]}
        assert not any(question(other) in shown for other in (*train, *test))


@pytest.mark.parametrize("name", GENERATORS)
def test_seeds_decide_the_rows(name):
    assert sample(name, 1) == sample(name, 1)
    assert [row["key"] for row in sample(name, 1)] != [row["key"] for row in sample(name, 1, seed=1)]
    assert sample(name, 2, size=40)[:20] == sample(name, 2, size=20)


def test_a_range_mixes_its_levels_evenly_and_keeps_them_apart_on_request():
    source = "gen:sort,difficulty=2..4,size=30"
    by_level = read_levels(source)
    assert list(by_level) == [2, 3, 4] and levels_of(source) == (2, 4) and levels_of("gen:sort,difficulty=3") == (3, 3)
    for level, found in by_level.items():
        assert found == read(f"gen:sort,difficulty={level},size=30")
        assert all(len(numbers(question(row))) == level + 2 for row in found)
    mixed = read(source)
    assert [len(numbers(question(row))) - 2 for row in mixed] == [2, 3, 4] * 30
    assert sorted(map(json.dumps, mixed)) == sorted(json.dumps(row) for found in by_level.values() for row in found)


def test_an_instance_of_two_levels_comes_once_and_sides_stay_apart():
    """Sums of numbers below 10 are also sums of numbers below 100."""
    train, test = (read(f"gen:add,difficulty=1..2,split={split},size=2000") for split in ("train", "test"))
    keys = [row["key"] for row in train]
    assert len(set(keys)) == len(keys) and not set(keys) & {row["key"] for row in test}


def test_small_spaces_are_halved():
    """100 products of two digits are 55 instances, three of which are examples."""
    sides = [read(f"gen:products,split={split},size=2000") for split in ("train", "test")]
    assert sum(map(len, sides)) == 52 and min(map(len, sides)) >= 20
    pairs = {tuple(sorted(numbers(question(row)))) for rows in sides for row in rows}
    assert len(pairs) == 52  # neither side holds 3 * 4 beside the other's 4 * 3


@pytest.mark.parametrize("name", "largest sort add count gcd products".split())
def test_operands_in_another_order_are_the_same_instance(name):
    rng, keys = np.random.default_rng(0), {}
    for _ in range(4000):
        row = GENERATORS[name].draw(rng, 1)
        operands = sorted(numbers(question(row))) or [question(row)[:7], *sorted(after(question(row)))]
        keys.setdefault(str(operands), []).append((row["key"], question(row)))
    repeated = [set(found) for found in keys.values() if len({text for _, text in found}) > 1]
    assert len(repeated) > 5 and all(len({key for key, _ in found}) == 1 for found in repeated)


@pytest.mark.parametrize("name", TINY)
def test_tiny_rows_fit_the_embedded_model(name):
    """Bytes are tokens; the chat template adds three to a prompt, the end of the turn one to a completion."""
    for level in levels(name):
        for row in sample(name, level):
            assert len(question(row).encode()) + 3 <= 64 and len(row["answer"].encode()) + 1 <= 32


def test_count_has_no_answer_that_beats_guessing():
    counts = Counter(row["answer"] for row in sample("count", 2, size=1200))
    assert set(counts) == set("123456") and max(counts.values()) < 1.3 * 200


def test_word_list():
    assert len(WORDS) == len(set(WORDS)) > 500
    assert all(re.fullmatch("[a-z]{3,11}", word) for word in WORDS)


def test_bench12_is_graded_on_four_levels():
    """A reply for each grade of 4 to 1, in more than half of the domains."""
    assert set(BENCH12) <= GENERATORS.keys()
    for name, nearly, wrong in (
        ("gcd", "The answer is {right}.", "97"),
        ("products", "The answer is {right}.", "97"),
        ("sort_numbers", "[{right}]", "{backwards}"),
        ("kth_letter", "'{right}'", "{other}"),
        ("weekday", "{right}.\nOf course.", "{other}"),
        ("tool_call", "Sure: {right}", '{{"name": "set_alarm", "arguments": {{"time": "0:61", "day": "Never"}}}}'),
        ("capitals", "{right}\nWas it that?", "WE LIKE NOTHING OF IT."),
    ):
        row, grader = sample(name, 1, size=1)[0], GRADERS[GENERATORS[name].environment]
        right = row["answer"] if isinstance(row["answer"], str) else json.dumps(row["answer"])
        given = {
            "right": right,
            "backwards": ", ".join(reversed(right.split(", "))),
            "other": next((choice for choice in row["meta"].get("choices", ()) if choice != right), ""),
        }
        for grade, reply in ((4, "{right}"), (3, nearly), (2, wrong), (1, "...")):
            assert grader(reply.format(**given), row["answer"], row["meta"]) == grade, (name, grade, reply)


def test_tool_calls_fit_their_schema_and_their_request():
    kinds = {"string": str, "integer": int}
    for row in sample("tool_call", 1) + sample("tool_call", 2):
        call = row["answer"]
        tool = next(tool for tool in TOOLS if tool["name"] == call["name"])
        schema = tool["parameters"]
        assert call["arguments"].keys() == set(schema["required"])
        for argument, value in call["arguments"].items():
            assert type(value) is kinds[schema["properties"][argument]["type"]] and str(value) in question(row)
        assert row["messages"][0]["role"] == "system"
        shown = [json.loads(line) for line in row["messages"][0]["content"].split("\n")[1:]]
        assert [tool["name"] for tool in shown] == [tool["name"] for tool in row["meta"]["tools"]]
        assert [*shown[TOOLS.index(tool)]["parameters"]] == schema["required"]
    assert len(TOOLS) == 5 and {row["answer"]["name"] for row in sample("tool_call", 1)} == {t["name"] for t in TOOLS}


def test_sentences_hold_the_asked_words():
    for level in (1, 2, 3):
        for row in sample("capitals", level):
            asked = re.search(r"with the words? (.*)\.", question(row))[1].split(" and ")
            assert len(asked) == level and row["answer"].isupper() and row["answer"].count(".") == 1
            assert set(asked) <= set(row["answer"].lower().rstrip(".").split())
            assert [want["word"] for want in row["meta"]["constraints"] if want["kind"] == "contains"] == asked
        assert all(row["answer"].islower() for row in sample("lowercase", level))


def function(source: str):
    namespace: dict = {}
    exec(source, namespace)
    return namespace["f"]


# description -> the function, written by hand
HAND = {
    r"x plus (\d+)\.": lambda k: lambda x: x + int(k),
    r"x divided by (\d+), rounded down": lambda k: lambda x: (x - x % int(k)) / int(k),
    r"True if x is greater than (\d+)": lambda k: lambda x: not x <= int(k),
    r"the larger of x and (\d+)": lambda k: lambda x: int(k) if x < int(k) else x,
    r"x times (\d+), plus (\d+)": lambda k, j: lambda x: int(j) + int(k) * x,
    r"the sum of x and (\d+), times (\d+)": lambda k, j: lambda x: int(j) * x + int(j) * int(k),
    r"a plus (\d+) times b": lambda k: lambda a, b: int(k) * b + a,
    r"the last (\d) characters of the string s": lambda i: lambda s: s[max(len(s) - int(i), 0) :],
    r"how often '(\w)' occurs in the string": lambda c: lambda s: sum(x == c for x in s),
    r"the string s followed by '(\w+)'": lambda w: lambda s: f"{s}{w}",
    r"True if the string s starts with '(\w)'": lambda c: lambda s: s[0] == c,
    r"the elements of the list xs that are less than (\d+)": lambda k: lambda xs: list(filter(int(k).__gt__, xs)),
    r"how often (\d+) occurs in the list xs": lambda k: lambda xs: sum(x == int(k) for x in xs),
}


def test_unit_tests_agree_with_functions_written_by_hand():
    rows, met = sample("code_write", 1, size=900), set()
    for row in rows:
        assert len(row["answer"].splitlines()) == 1 and ast.parse(row["answer"])
        for pattern, make in HAND.items():
            if found := re.search(f"returns {pattern}", question(row)):
                met.add(pattern)
                for test in row["meta"]["tests"]:
                    assert make(*found.groups())(*test["args"]) == test["expect"], question(row)
    assert met == HAND.keys()


@pytest.mark.parametrize("k,j", [(4, 7), (9, 20), (15, 3)])
def test_unit_tests_accept_the_reference_and_tell_functions_apart(k, j):
    results: dict[tuple, str] = {}
    for arguments, text, expression in code_tasks.FUNCTIONS:
        values = (("k", k), ("j", j), ("i", 2), ("c", "b"), ("d", "n"), ("w", "gate"))
        task = code_tasks._write(arguments, text, expression, values)
        reference = function(task.reply)
        for test in task.meta["tests"]:
            assert reference(*test["args"]) == test["expect"]
        result = (arguments, json.dumps([test["expect"] for test in task.meta["tests"]]))
        assert result not in results, (text, results.get(result))
        results[result] = text
    assert len(results) >= 40


def test_python_tests_grader_takes_the_reference_and_refuses_another():
    first, second = sample("code_write", 1, size=2)
    assert GRADERS["python_tests"](first["answer"], first["answer"], first["meta"]) == 4
    assert GRADERS["python_tests"](second["answer"], first["answer"], first["meta"]) < 3


@pytest.mark.parametrize(
    "source,message",
    [
        ("gen:revers", "no generator is called 'revers'; known: copy, "),
        ("gen:reverse,dificulty=2", "unknown parameter 'dificulty=2'; known: difficulty, split, size, seed"),
        ("gen:reverse,difficulty=15", "difficulty='15'; expected a whole number from 1 to 14"),
        ("gen:reverse,difficulty=two", "difficulty='two'; expected a whole number from 1 to 14"),
        ("gen:reverse,difficulty=3..1", "difficulty='3..1'; the easier level comes first: 1..3"),
        ("gen:reverse,difficulty=1..15", "difficulty='15'; expected a whole number from 1 to 14"),
        ("gen:reverse,difficulty=1..2..3", "difficulty='1..2..3'; expected a level, 2, or a range, 1..4"),
        ("gen:reverse,size=0", "size='0'; expected a whole number from 1 to 1000000"),
        ("gen:reverse,split=dev", "split='dev'; expected train or test"),
    ],
)
def test_a_wrong_source_is_one_line(source, message):
    with pytest.raises(ValueError) as error:
        read(source)
    assert str(error.value).startswith(f"source {source!r}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_library_names_the_pip_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="pip install reasoning-gym"):
        read("gen:gcd,difficulty=3,seed=99")
