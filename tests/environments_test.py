"""The environment protocol: users' modules in both forms, names with options, and batches in which some rows fail."""

import json
import logging
import os
import threading
import time

import pytest

from rubric.environments import registry, runner, user_module
from rubric.environments.protocol import (
    Environment,
    Unavailable,
    checked_grade,
    checked_turns,
    grade_of_reward,
    is_environment,
)
from rubric.environments.runner import Environments, Turns
from rubric.environments.user_module import UserModule

OURS = """
def interact(messages):
    print("noise")
    if "ask" in messages[-1]["content"]:
        return [{"role": "tool", "content": f"{len(messages)} so far", "name": "dropped"}]
    return []

def grade(messages, answer):
    return 4 if messages[-1]["content"] == answer else 1
"""
AUTHORS = """
import re
def interact(messages):
    return [{"role": "tool", "content": q} for q in re.findall("<q>(.*?)</q>", messages[-1]["content"])]

def reward_fn(messages, answer):
    return answer in messages[-1]["content"]
"""
BAD = """
import os, time
def interact(messages):
    word = messages[-1]["content"]
    if word == "hang": time.sleep(60)
    if word == "die": os._exit(7)
    if word == "raise": raise KeyError("two\\nlines")
    if word == "exit": raise SystemExit(3)
    return {"none": None, "text": "x", "role": [{"role": "assistant", "content": ""}],
            "content": [{"role": "tool", "content": 3}]}.get(word, [{"role": "tool", "content": "ok"}])

def grade(messages, answer):
    return {"nan": float("nan"), "high": 5, "text": "x", "none": None}.get(answer, 2)
"""


def said(text: str) -> list[dict]:
    return [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]


@pytest.fixture
def written(tmp_path):
    def write(text: str, name: str = "env.py") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_which_files_are_environments(written):
    assert is_environment(written(OURS)) and is_environment(written(AUTHORS))
    assert is_environment(written("def reward_fn(messages, answer): return 0"))
    assert is_environment(written("def grade(messages, answer): return 1"))
    assert is_environment(written("def grade(messages, answer, strict=False): return 1"))
    assert is_environment(written("from other import interact, grade"))
    assert not is_environment(written("def grade(reply, answer, meta): return 1"))
    assert not is_environment(written("from other import grade"))


@pytest.mark.parametrize(
    "text, reason",
    [
        ("def interact(messages): return []", "defines no `grade`: add `def grade"),
        ("x = 1", "defines no `grade`: add `def grade"),
        ("def grade(:", r"is not valid Python: .* at .*env\.py:1"),
        (
            "x = 1\nasync def interact(messages): return []\ndef reward_fn(m, a): return 0",
            r"env\.py:2: interact is async",
        ),
        ("def interact(m): return []\ndef grade(reply, answer, meta): return 1", r"env\.py:2: grade takes \(reply"),
    ],
)
def test_files_that_are_neither_are_one_line(written, text, reason):
    with pytest.raises(ValueError, match=reason) as error:
        registry.check(written(text), "domains[1].environment")
    assert str(error.value).startswith("domains[1].environment ") and "\n" not in str(error.value)


def test_a_missing_file_is_one_line():
    with pytest.raises(FileNotFoundError, match=r"^domains\[0\].environment 'no.py': there is no such file"):
        registry.check("no.py", "domains[0].environment")


def test_values_at_the_border_of_the_protocol():
    assert [grade_of_reward(reward) for reward in (True, False, 0.5, 1)] == [4.0, 1.0, 2.5, 4.0]
    for reward in (None, "x", 1.1, -0.1, float("nan"), [1]):
        with pytest.raises(ValueError, match="reward_fn returned"):
            grade_of_reward(reward)
    assert checked_grade(2) == 2.0
    for grade in (True, 0.9, 4.1, None, float("nan"), "3"):
        with pytest.raises(ValueError, match="grade returned"):
            checked_grade(grade)
    assert checked_turns(()) == []
    for turns in (None, "x", {"role": "tool"}, [{"role": "tool"}], [{"role": "assistant", "content": "x"}], ["x"]):
        with pytest.raises(ValueError, match="interact returned"):
            checked_turns(turns)


def test_both_forms_of_a_users_module(written):
    with Environments([written(OURS, "a.py"), written(AUTHORS, "b.py"), "eq"]) as environments:
        rows = [{"answer": "yes"}] * 5
        conversations = [said("ask"), said("yes"), said("<q>1</q><q>2</q>"), said("oh yes"), said("yes")]
        domain_B = [0, 0, 1, 1, 2]
        assert environments.interact(domain_B, rows, conversations) == [
            Turns([{"role": "tool", "content": "2 so far"}], ""),
            Turns([], ""),
            Turns([{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}], ""),
            Turns([], ""),
            Turns([], ""),
        ]
        grades = environments.grade(domain_B[:4], rows[:4], conversations[:4])
        assert grades == [(1.0, ""), (4.0, ""), (1.0, ""), (4.0, "")]
        assert environments.of_domain[2] is None
        assert environments.grade([2], rows[:1], conversations[:1])[0].grade is None
        assert not environments.failures.keys() - {(2, "the domain grades single replies")}


def test_what_goes_wrong_costs_its_row_only(written, caplog):
    module = UserModule(written(BAD), processes=2, timeout_s=0.7)
    words = ["fine", "hang", "die", "raise", "exit", "none", "text", "role", "content", "fine"]
    with Environments([module]) as environments, caplog.at_level(logging.WARNING):
        turns = environments.interact([0] * len(words), [{}] * len(words), [said(word) for word in words])
        reasons = dict(zip(words, (turn.reason for turn in turns)))
        assert turns[0] == turns[-1] == Turns([{"role": "tool", "content": "ok"}], "")
        assert reasons["hang"] == "timeout: over 0.7 s"
        assert reasons["die"] == "the environment's process died with status 7"
        assert "KeyError" in reasons["raise"] and "SystemExit" in reasons["exit"]
        for word in ("none", "text", "role", "content"):
            assert "interact returned" in reasons[word] and "\n" not in reasons[word]
        answers = ["2", "nan", "high", "text", "none"]
        grades = environments.grade([0] * 5, [{"answer": answer} for answer in answers], [said("x")] * 5)
        assert [result.grade for result in grades] == [2.0, None, None, None, None]
        assert sum(environments.failures.values()) == 12
    assert len(caplog.records) == 1  # once a minute
    assert "8 rows are invalid because their environment failed" in caplog.text


def test_a_module_that_hangs_is_given_up_for_a_while(written, monkeypatch):
    module = UserModule(written(BAD), processes=4, timeout_s=0.2)
    with Environments([module]) as environments:
        began = time.monotonic()
        turns = environments.interact([0] * 60, [{}] * 60, [said("hang")] * 60)
        assert time.monotonic() - began < 10
        reasons = [turn.reason.split(":")[0] for turn in turns]
        assert reasons.count("timeout") >= user_module.IN_A_ROW and reasons.count("given up for 60 s") >= 40
        monkeypatch.setattr(module, "_again", 0.0)
        assert environments.interact([0], [{}], [said("fine")])[0].messages
        assert environments.interact([0], [{}], [said("fine")])[0].messages


def test_a_file_that_does_not_load_ends_the_start(written):
    path = written("import no_such_module\ndef reward_fn(messages, answer): return 1")
    with pytest.raises(
        ValueError, match=r"does not load: ModuleNotFoundError: No module named 'no_such_module'"
    ) as error:
        Environments(["eq", path])
    assert "\n" not in str(error.value)


def test_the_module_runs_outside_the_trainer(written):
    text = (
        "import os, sys\ndef interact(messages): return [{'role': 'tool', 'content': f'{os.getpid()} '"
        'f\'{os.environ["JAX_PLATFORMS"]} {"jax" in sys.modules}\'}]\ndef reward_fn(m, a): return 0'
    )
    with Environments([written(text)]) as environments:
        (turns,) = environments.interact([0], [{}], [said("x")])
    process, platforms, has_jax = turns.messages[0]["content"].split()
    assert int(process) != os.getpid() and (platforms, has_jax) == ("cpu", "False")
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)  # closed with the environments


@pytest.mark.parametrize(
    "name, reason",
    [
        ("calculater", "did you mean 'calculator'"),
        ("nonsense", "use one of calculator, python, tools, searchr1"),
        ("eq", "is no environment of several turns"),
        ("calculator,grade", "'grade' is no option; write name,option=value"),
        ("calculator,use=python", "there is no option 'use'; there is grade"),
        ("calculator,grade=orz", "grade=orz cannot be used here; use one of eq, "),
        ("tools,use=calculator+abacus", "no built-in tool is named 'abacus'; use calculator or python"),
        ("tools,file=no.json", "file=no.json cannot be read"),
        ("searchr1,url=localhost", "url=localhost is no address of a search service"),
        ("searchr1,topk=0", "topk=0 is no positive whole number"),
        ("searchr1,topk=x", "invalid literal"),
        ("searchr1,timeout_s=-1", "timeout_s=-1 is no positive number"),
    ],
)
def test_wrong_names_and_options_are_one_line(name, reason):
    with pytest.raises(ValueError, match=reason) as error:
        registry.check(name, "domains[2].environment")
    assert str(error.value).startswith("domains[2].environment ") and "\n" not in str(error.value)


def test_names_give_environments(tmp_path):
    schemas = [{"name": "alarm", "parameters": {"type": "object", "properties": {"time": {"type": "string"}}}}]
    (tmp_path / "tools.json").write_text(json.dumps(schemas))
    names = ["calculator", "python,grade=eq", "tools", "tools,use=calculator+python", "searchr1,topk=5"]
    for name in [*names, f"tools,file={tmp_path / 'tools.json'},grade=eq"]:
        registry.check(name)
        assert isinstance(registry.load(name), Environment)
    with Environments(["calculator", f"tools,use=python,file={tmp_path / 'tools.json'}", "number"]) as environments:
        shown = [[tool["function"]["name"] for tool in environments.tools(d, {"answer": "1"})] for d in (0, 1)]
        assert shown == [["calculator"], ["python", "alarm"]]
        assert environments.tools(2, {}) is None
        with pytest.raises(ValueError, match="tools is 3; expected a list"):
            environments.tools(0, {"tools": 3})


def test_a_conversation_with_the_calculator():
    row, messages = {"answer": "42", "meta": {}}, [{"role": "user", "content": "6*7?"}]
    replies = ["<tool name='calculator'>6*</tool>", "<tool name='calculator'>6*7</tool>", "42"]
    with Environments(["calculator"]) as environments:
        for reply in replies:
            messages.append({"role": "assistant", "content": reply})
            (turns,) = environments.interact([0], [row], [messages])
            messages += turns.messages
        assert [message["content"] for message in messages if message["role"] == "tool"] == [
            "error: cannot read '6*' as arithmetic", "42",
        ]  # fmt: skip
        assert environments.grade([0], [row], [messages])[0] == (4.0, "")


class Down:
    """Answers all rows at once; those that ask for it are Unavailable."""

    def __init__(self):
        self.calls = []

    def interact(self, messages):
        raise AssertionError("interact_all is there")

    def interact_all(self, conversations):
        self.calls.append(threading.get_ident())
        return [Unavailable("it is down") if c[-1]["content"] == "down" else [] for c in conversations]

    def grade(self, messages, answer):
        raise Unavailable("judge away")


def test_rows_together_and_those_that_are_invalid(caplog, monkeypatch):
    down = Down()
    with Environments([down, "eq", down]) as environments, caplog.at_level(logging.WARNING):
        words = ["down", "x", "y", "z"]
        turns = environments.interact([0, 0, 1, 0], [{}] * 4, [said(word) for word in words])
        assert [turn.reason for turn in turns] == ["it is down", "", "", ""] and len(down.calls) == 1
        assert environments.grade([0], [{}], [said("x")])[0] == (None, "judge away")
        assert len(caplog.records) == 1
        monkeypatch.setattr(environments, "_said_at", time.monotonic() - runner.QUIET_S)
        environments.interact([2], [{}], [said("down")])
        assert len(caplog.records) == 2 and "2 rows are invalid" in caplog.records[1].message
