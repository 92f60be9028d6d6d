"""Evaluation suites read from small files in their published forms, and graded on right and wrong replies."""

import csv
import json

import pytest

from curriculum import domains, sources
from curriculum.domains import DomainConfig
from curriculum.suites import SUITES, located
from rubric.verify import GRADERS

# What a line of each file looks like; the tasks are made up.
MATH = {
    "problem": "What is $\\frac{1}{2}+\\frac{1}{4}$?",
    "solution": "We add. $\\boxed{\\frac{3}{4}}$",
    "answer": "\\frac{3}{4}",
    "subject": "Prealgebra",
    "level": 1,
    "unique_id": "test/prealgebra/1.json",
}
GSM = {"question": "Tom has 1000 nuts and gets 72 more.", "answer": "He has 1000+72=<<1000+72=1072>>1072.\n#### 1,072"}
HUMAN = {
    "task_id": "HumanEval/900",
    "prompt": 'from typing import List\n\n\ndef evens(xs: List[int]) -> List[int]:\n    """ Even ones.\n    """\n',
    "entry_point": "evens",
    "canonical_solution": "    return [x for x in xs if x % 2 == 0]\n",
    "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2]) == [2]\n",
}
MBPP = {
    "text": "Write a function to add one.",
    "code": "def inc(n):\r\n  return n + 1",
    "task_id": 900,
    "test_setup_code": "",
    "test_list": ["assert inc(1) == 2", "assert set([inc(2)]) == set([3])"],
    "challenge_test_list": [],
}
SANITIZED = {
    "source_file": "x",
    "task_id": 901,
    "prompt": "Write a function for the area of a circle.",
    "code": "import math\ndef area(r):\n  return math.pi*r*r",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(area(1), math.pi)"],
}
IFEVAL = {
    "key": 1000,
    "prompt": "Write a title without commas.",
    "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
    "kwargs": [{}, {}],
}
SIMPLE = {"metadata": "{'topic': 'Art'}", "problem": "Who painted it?", "answer": "Ada Stone"}

# suite: (row, (reply, grade), ...)
CASES = {
    "math500": (MATH, ("It is \\boxed{0.75}", 4), ("\\boxed{\\frac{1}{4}}", 2)),
    "gsm8k": (GSM, ("So \\boxed{1072} nuts", 4), ("\\boxed{1,072}", 4), ("\\boxed{72}", 2), ("Many.", 1)),
    "humaneval": (
        HUMAN,
        ("    return [x for x in xs if x % 2 == 0]\n", 4),  # the rest of the prompt, as a base model goes on
        ("def evens(xs: List[int]) -> List[int]:\n    return [x for x in xs if not x % 2]", 4),
        ("Sure!\n```python\ndef evens(xs):\n    return [x for x in xs if not x % 2]\n```", 3),
        ("def evens(xs):\n    return xs", 1),
        ("    return xs", 1),
        ("I cannot.", 1),
        ("def evens(xs):\n    import os\n    os._exit(0)", 1),
        ("class All(list):\n    __eq__ = lambda a, b: True\n\ndef evens(xs):\n    return All()", 1),
    ),
    "mbpp": (
        MBPP,
        ("def inc(n):\n    return n + 1", 4),
        ("```python\ndef inc(n):\n    return n + 1\n```", 3),
        ("def inc(n):\n    return 2", 2),
        ("def inc(n):\n    return 0", 1),
    ),
    "ifeval": (IFEVAL, ("<<The sea>>", 4), ("Sure, here:\n<<The sea>>", 3), ("<<The sea, again>>", 2), (",", 1)),
    "simpleqa": (SIMPLE, ("Ada Stone", 4), ("ada stone.", 3), ("Ada Brick", 2), ("Nobody", 1)),
}


def written(tmp_path, row, name="rows.jsonl"):
    path = tmp_path / name
    if name.endswith(".csv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerow(row)
    else:
        path.write_text(json.dumps([row]) if name.endswith(".json") else json.dumps(row) + "\n")
    return str(path)


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_is_read_and_graded(tmp_path, name):
    row, *replies = CASES[name]
    path = written(tmp_path, row, "rows.csv" if name == "simpleqa" else "rows.jsonl")
    (found,) = sources.read(f"suite:{name}:{path}")
    question = found["messages"][0]["content"]
    assert (row.get("problem") or row.get("question") or row.get("prompt") or row["text"]) in question
    grader = GRADERS[SUITES[name].environment]
    assert [(reply, grader(reply, found["answer"], found.get("meta") or {})) for reply, _ in replies] == list(replies)


def test_a_humaneval_test_may_use_the_prompts_helpers(tmp_path):
    """As HumanEval/32 and /38 do."""
    prompt = "def twice(x):\n    return 2 * x\n\n\ndef half(x):\n    "
    test = "def check(candidate):\n    assert candidate(twice(7)) == 7\n"
    row = HUMAN | {"prompt": prompt, "entry_point": "half", "test": test}
    (found,) = sources.read(f"suite:humaneval:{written(tmp_path, row)}")
    assert GRADERS["asserts"]("    return x // 2", None, found["meta"]) == 4
    assert GRADERS["asserts"]("def half(x):\n    return twice(x) // 4", None, found["meta"]) == 4
    assert GRADERS["asserts"]("def half(x):\n    return x", None, found["meta"]) == 1


def test_the_other_form_of_mbpp(tmp_path):
    (found,) = sources.read(f"suite:mbpp:{written(tmp_path, SANITIZED, 'sanitized-mbpp.json')}")
    assert found["meta"]["entry"] == "area" and found["meta"]["setup"] == "import math"
    assert GRADERS["asserts"]("def area(r):\n    return 3.141592653589793 * r * r", None, found["meta"]) == 4
    assert GRADERS["asserts"]("def area(r):\n    return 3 * r * r", None, found["meta"]) == 1


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("math500", {"problem": "x"}, "rows.jsonl:1: answer is missing; expected problem, answer"),
        ("gsm8k", {"question": "x", "answer": "72"}, "rows.jsonl:1: answer has no #### before its result"),
        ("humaneval", {**HUMAN, "test": "def check(:"}, "rows.jsonl:1: test is no Python: "),
        ("mbpp", {**MBPP, "test_list": ["1 +"]}, "rows.jsonl:1: test_list holds '1 +', which is no Python"),
        ("mbpp", {**MBPP, "test_list": ["assert True"]}, "rows.jsonl:1: test_list calls no function by name"),
        ("mbpp", {**MBPP, "test_list": "assert"}, "rows.jsonl:1: test_list is 'assert'; expected a list of texts"),
        ("ifeval", {**IFEVAL, "kwargs": [{}]}, "rows.jsonl:1: kwargs has not one entry for each of 2"),
        ("simpleqa", {**SIMPLE, "problem": 3}, "rows.jsonl:1: problem is '3'; expected text"),
        ("math500", [1], "rows.jsonl:1: the row is no object"),
    ],
)
def test_a_row_that_does_not_fit_names_its_line(tmp_path, name, row, message):
    with pytest.raises(ValueError) as caught:
        sources.read(f"suite:{name}:{written(tmp_path, row)}")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("suite:gsm9k:x.jsonl", ValueError, "no suite is called 'gsm9k'; known: math500, gsm8k"),
        ("suite:gsm8k", ValueError, "expected suite:gsm8k:PATH"),
        ("suite:gsm8k:none.jsonl", FileNotFoundError, "none.jsonl: no such file"),
        ("suite:gsm8k:x.txt", ValueError, "x.txt: expected a .json, .jsonl, .csv, .parquet file"),
    ],
)
def test_a_source_that_is_none(tmp_path, source, error, message):
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(error) as caught:
        sources.read(source, tmp_path)
    assert message in str(caught.value)


def test_suites_are_for_evaluation_only(tmp_path, monkeypatch):
    source = f"suite:gsm8k:{written(tmp_path, GSM)}"
    trained = DomainConfig("gsm", source, source, "orz")
    with pytest.raises(ValueError, match="a suite is for evaluation: name it under `test`, with eval_only: true"):
        domains.load([trained])
    (loaded,) = domains.load([DomainConfig("gsm", None, source, "orz", eval_only=True)])
    assert loaded.test_rows[0]["answer"] == "1072" and loaded.train_rows == []
    with pytest.raises(ValueError, match="made for orz, set environment: orz"):
        domains.check([DomainConfig("gsm", None, source, eval_only=True)])
    domains.check([DomainConfig("gsm", None, source, rubric="math", eval_only=True)])
    monkeypatch.chdir(tmp_path)
    assert located("suite:gsm8k:rows.jsonl") == source and located("rows.jsonl") == "rows.jsonl"
