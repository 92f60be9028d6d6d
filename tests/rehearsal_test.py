"""Rehearsal: forms, what is read off a reply, agreement, the gate's drops, files; the shipped model as M0 (slow).

The shipped model, a minute: pytest -m slow tests/rehearsal_test.py
"""

import dataclasses
import inspect
import json
import random
import re

import jax
import numpy as np
import pytest

from configs import cli
from curriculum import domains, forms, rehearsed
from infinite_jax import gate, rehearsal, rehearsal_rounds
from infinite_jax.lock import RunLock
from infinite_jax.rehearsal_model import M0, Reply
from rubric import majority
from rubric.evaluator import RubricConfig, RubricEvaluator


@pytest.mark.parametrize(
    "form",
    [
        "copy: [a-z]{5}",
        r"largest: \d{1,2}( \d{1,2}){2}",
        r"is it (hot|c[o0]ld)\? [A-C\-]{0,2}",
        "a(b|)c?",
        r"add: \d \+ \d",
    ],
)
def test_what_is_drawn_from_a_form_has_it(form):
    rng = random.Random(0)
    drawn = {forms.draw(form, rng) for _ in range(200)}
    assert all(re.fullmatch(form, text) and forms.matches(form, text) for text in drawn)
    assert len(drawn) > 1 and not forms.matches(form, min(drawn) + "!")


def test_all_that_a_form_allows_is_drawn():
    rng = random.Random(0)
    assert {forms.draw("(a|bc){1,2}d?", rng) for _ in range(500)} == {
        first + second + end for first in ("a", "bc") for second in ("", "a", "bc") for end in ("", "d")
    }


@pytest.mark.parametrize(
    ("form", "place"),
    [("a*", 2), ("[a-z", 1), ("(a", 1), ("a)", 2), ("[z-a]", 4), ("a{3,2}", 2), ("a{x}", 2), (r"\w", 1), ("[^a]", 2)],
)
def test_a_form_that_cannot_be_drawn_is_refused_with_the_place(form, place):
    with pytest.raises(ValueError, match=rf"character {place},"):
        forms.check(form)
    with pytest.raises(ValueError, match=r"^domains\[0\].form="):
        domains.check([domains.DomainConfig("a", test="gen:copy,split=test", eval_only=True, form=form)])


@pytest.mark.parametrize(
    ("reply", "prompt"),
    [
        ("What is 3 + 4?", "What is 3 + 4?"),
        ('Sure, here is one:\n\n"What is 3 + 4?"', "What is 3 + 4?"),
        ("**Exercise 2:** copy: abc\n", "copy: abc"),
        ("Question: 'a' or 'b'?", "'a' or 'b'?"),
        ("print(3)\nprint(4)", "print(3)\nprint(4)"),
        (" \n--\n", ""),
        ("Exercise:", ""),
    ],
)
def test_the_prompt_in_a_reply(reply, prompt):
    assert rehearsed.parse(reply) == prompt


def test_repetitions_are_those_of_the_wording():
    seen = set()
    assert rehearsed.fresh(["Copy: ab!", "copy  ab", "copy: abc", "3 + 4", "3 - 4"], seen) == [
        True,
        False,
        True,
        True,
        True,
    ]
    assert rehearsed.fresh(["COPY AB"], seen) == [False]


def grades(environment: str, answers: list, replies: list[str], meta: dict | None = None) -> np.ndarray:
    with RubricEvaluator([environment], RubricConfig("graded", 1, 5.0, None)) as grader:
        return np.array(
            [
                grader.grade([0] * len(replies), [{"answer": a, "meta": meta}] * len(replies), replies).grade_B
                for a in answers
            ]
        )


def test_agreement_is_the_graders_own():
    replies = ["The answer is 12.", "12", "13", "12.0", "12 or 13", ""]
    read = [majority.candidate("number", reply) for reply in replies]
    assert read == ["12", "12", "13", "12.0", None, None]
    answers = majority.distinct(read)
    found = majority.majority(answers, grades("number", answers, replies))
    assert found == ("12", 0.5)  # "12.0" is the same number; two that name none or two do not vote
    replies = ["4, 8", "[4,8]", "8, 4", "4, 8."]
    answers = majority.distinct([majority.candidate("list", reply) for reply in replies])
    assert majority.majority(answers, grades("list", answers, replies)) == ("4, 8", 0.75)
    call = {"name": "f", "arguments": {"x": 1}}
    assert majority.candidate("json_call", f"call {json.dumps(call)}") == call
    assert majority.candidate("json_call", json.dumps(call) * 2) is majority.candidate("json_call", "{}") is None
    assert majority.candidate("line", "a\nb") == "a" and majority.candidate("orz", r"so \boxed{7}") == "7"
    assert majority.candidate("eq", "<answer> a </answer>") == "a" and majority.candidate("eq", " ") is None
    assert majority.majority([], np.zeros((0, 4))) == (None, 0.0)
    assert majority.majority(["a"], np.array([[np.nan, 2.0]])) == (None, 0.0)


class Stub:
    """An M0 that writes what it is told and answers with the text behind `copy: `, in `agree` of 8 replies."""

    def __init__(self, texts: list[str], agree: int = 8):
        self.texts, self.agree, self.told = texts, agree, []

    def open_turn(self, turns, number, key):
        self.told += turns
        return [Reply(text, True) for text in self.texts[:number]]

    def ask(self, messages, number, key):
        self.told += messages
        return [Reply(f"Exercise: {text}", True) for text in self.texts[:number]]

    def answer(self, asked, key):
        said = [messages[-1]["content"].removeprefix("copy: ") for messages in asked]
        return [[Reply(text if n < self.agree else f"{text}{n}", True) for n in range(8)] for text in said]

    def fits(self, messages):
        return len(messages[-1]["content"]) < 20


@pytest.fixture
def config(tmp_path, monkeypatch):
    """`old`, a prior domain without rows, its test rows behind one turn each; `fresh` to be learned."""
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "copy: zz"}, {"role": "assistant", "content": "zz"}]
    tests = [
        {"messages": [*turns, {"role": "user", "content": f"copy: secret {x}"}], "answer": f"secret {x}"} for x in "ab"
    ]
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(row | {"meta": {"of": "all"}}) + "\n" for row in tests))
    (tmp_path / "mine.yaml").write_text(
        "defaults: [config, _self_]\ndomains:\n"
        "  - {name: old, test: old.jsonl, eval_only: true, description: Copy the text.}\n"
        "  - {name: fresh, new: true, train: 'gen:copy,size=8', test: 'gen:copy,split=test,size=8'}\n"
        "upgrade: {rehearsal: self, writing: {prompts: 4, least: 2, attempts: 2, reward: agreement}}\n"
        "contamination: {stages: [exact, near]}\nrubric: {workers: 1}\n"
    )
    return cli.compose_config("mine", str(tmp_path), [])


def writing(config, **changes):
    changed = dataclasses.replace(config.upgrade.writing, **changes)
    return dataclasses.replace(config, upgrade=dataclasses.replace(config.upgrade, writing=changed))


WRITTEN = ["copy: one", "Copy: one!", "copy: SECRET a.", "copy: zz", "copy: " + "long " * 9, "copy: two", "  "]


def test_what_is_dropped_is_counted_by_its_reason_and_the_rest_is_kept(config):
    config = writing(config, prompts=8, attempts=1)
    kept, notes = rehearsal.write(config, ["old"], Stub(WRITTEN))
    assert not notes and [row["messages"][-1]["content"] for row in kept["old"].rows] == ["copy: one", "copy: two"]
    prefix = kept["old"].report()["sources"]["prefix"]
    assert prefix == {
        "written": 7, "unended": 0, "unread": 1, "duplicate": 2, "too_long": 1, "disputed": 0, "failed": 0,
        "contaminated": 1, "kept": 2,
    }  # fmt: skip
    assert kept["old"].report()["examples"]["contaminated"] == ["copy: SECRET a."]
    row = kept["old"].rows[0]
    assert [turn["content"] for turn in row["messages"]] == ["copy: zz", "zz", "copy: one"] and row["answer"] == "one"
    assert row["meta"] == {"of": "all", "rehearsal": {"source": "prefix", "by": "agreement", "agreement": 1.0}}


def test_a_model_that_writes_evaluation_questions_alone_is_left_with_nothing(config, tmp_path):
    kept, notes = rehearsal.write(config, ["old"], Stub(["copy: secret a", "copy: secret b!"]))
    assert kept["old"].rows == [] and kept["old"].counts["prefix"]["contaminated"] == 2
    assert notes["old"].startswith("0 prompts kept, fewer than upgrade.writing.least=2")


def test_what_m0_does_not_agree_with_itself_on_is_dropped(config):
    kept, _ = rehearsal.write(config, ["old"], Stub(["copy: one"], agree=5))
    assert kept["old"].rows == [] and kept["old"].counts["prefix"]["disputed"] == 1
    kept, _ = rehearsal.write(config, ["old"], Stub(["copy: one"], agree=6))
    assert [row["meta"]["rehearsal"]["agreement"] for row in kept["old"].rows] == [0.75]


def test_the_writer_never_sees_a_question_of_the_evaluation(config):
    stub = Stub(WRITTEN)
    rehearsal.write(config, ["old"], stub)
    assert stub.told and not any("secret" in turn["content"] for turn in stub.told)
    assert any("Copy the text." in turn["content"] and "- copy: zz" in turn["content"] for turn in stub.told)
    # what the rounds get: frames and tools, among which the check alone was made from evaluation rows
    (domain, *_) = domains.load(config.domains)
    assert "secret" not in repr(rehearsed.frame(domain)) and "secret" in repr(domain.test_rows)
    assert list(inspect.signature(rehearsal_rounds.run).parameters) == ["config", "kept", "tools"]
    assert rehearsal_rounds.Tools._fields == ("m0", "contaminated", "needs_answer", "grade", "nearest", "key")


def test_the_frame_has_only_what_all_rows_share(config):
    (domain, *_) = domains.load(config.domains)
    other = dict(domain.test_rows[1], messages=domain.test_rows[1]["messages"][-1:], meta={"of": "one", "more": 1})
    mixed = rehearsed.frame(domain._replace(test_rows=[domain.test_rows[0], other]))
    assert mixed.turns == () and mixed.meta == {}
    assert rehearsed.frame(domain._replace(test_rows=domain.test_rows[:1])).turns == ()


@pytest.fixture
def lock():
    with RunLock() as lock:
        yield lock


def test_prepare_makes_the_rows_the_domains_training_source(config, tmp_path, lock, monkeypatch):
    monkeypatch.setattr(rehearsal, "M0", lambda config: Stub(["copy: one", "copy: two"]))
    made = rehearsal.prepare(config, tmp_path / "run", lock)
    old, fresh = made.domains
    assert not old.eval_only and old.train == str(tmp_path / "run" / "rehearsal" / "old.jsonl")
    assert fresh == config.domains[1]
    (read, _) = domains.load(made.domains)
    assert [(row["messages"][-1]["content"], row["answer"]) for row in read.train_rows] == [
        ("copy: one", "one"), ("copy: two", "two"),
    ]  # fmt: skip
    report = json.loads((tmp_path / "run" / "rehearsal" / "report.json").read_text())
    assert report["domains"]["old"]["kept_by_agreement"] == 2 and report["evaluation_only"] == {}
    screened = gate.screen(made)  # the ordinary path from here on
    assert len(screened.domains[0].train_rows) == 2 and rehearsal.prepare(made, tmp_path / "other", lock) is made
    unasked = dataclasses.replace(config, upgrade=dataclasses.replace(config.upgrade, rehearsal="none"))
    assert rehearsal.prepare(unasked, tmp_path / "other", lock) is unasked


def test_a_domain_with_too_few_rows_stays_evaluation_only(config, tmp_path, lock, monkeypatch, capsys):
    monkeypatch.setattr(rehearsal, "M0", lambda config: Stub(["copy: one"]))
    made = rehearsal.prepare(config, tmp_path / "run", lock)
    assert made == config and not (tmp_path / "run" / "rehearsal" / "old.jsonl").exists()
    assert "old: evaluation only: 1 prompts kept, fewer than upgrade.writing.least=2" in capsys.readouterr().out


def with_old(config, **changes):
    return dataclasses.replace(config, domains=(dataclasses.replace(config.domains[0], **changes), config.domains[1]))


@pytest.mark.parametrize(
    ("environment", "note"),
    [
        ("calculator", "grades conversations"),
        ("python_tests", "reads tests of each row's own"),
        ("constraints", "reads tests of each row's own"),
    ],
)
def test_domains_that_no_answer_grades_are_left_with_one_line(config, environment, note):
    kept, notes = rehearsal.write(with_old(config, environment=environment), ["old"], Stub(WRITTEN))
    assert kept == {} and note in notes["old"]


def test_a_rubric_that_needs_no_answer_grades_instead_of_agreement(config, tmp_path):
    (tmp_path / "short.yaml").write_text(
        "about: short\ngrades: {2: 0.3, 3: 0.6, 4: 1}\ncriteria:\n  brief: {check: constraint, kind: max_words, n: 1}\n"
    )
    rubric = with_old(config, rubric="short.yaml")
    kept, _ = rehearsal.write(rubric, ["old"], Stub(["copy: one", "copy: two words"], agree=1))
    (row,) = kept["old"].rows
    assert row["answer"] == "one" and row["meta"]["rehearsal"]["by"] == "rubric"
    assert kept["old"].counts["prefix"]["failed"] == 1


def test_without_a_reward_prompts_are_kept_for_the_kl_alone(config, tmp_path, lock, monkeypatch):
    config = with_old(writing(config, reward="none"), environment="python_tests")
    kept, notes = rehearsal.write(config, ["old"], Stub(["copy: one", "copy: two"]))
    assert not notes and kept["old"].report()["kept_for_distillation"] == 2
    with RubricEvaluator(["python_tests"], RubricConfig("graded", 1, 5.0, None)) as grader:
        found = grader.grade([0, 0], [kept["old"].rows[0]] * 2, ["one", "anything"])
    assert found.grade_B.tolist() == [4, 4] and found.valid_B.all() and not grader.failures
    dropping = dataclasses.replace(config, algorithm=dataclasses.replace(config.algorithm, zero_variance="drop"))
    with pytest.raises(ValueError, match="zero_variance=drop"):
        rehearsal.prepare(dropping, tmp_path, lock)


def test_texts_without_a_hint_go_to_the_domain_of_their_form_else_to_the_nearest_description(config):
    frames = [
        rehearsed.Frame("copy", "eq", "Copy.", "copy: [a-z]{3}", (), {}),
        rehearsed.Frame("add", "number", "Add.", None, (), {}),
    ]
    kept = [rehearsal_rounds.Kept(frame, n) for n, frame in enumerate(frames)]

    def nearest(texts):
        return ["add" if "+" in text else "elsewhere" for text in texts]

    tools = rehearsal_rounds.Tools(
        Stub(["copy: abc", "1 + 2", "else"]), lambda written: [False] * len(written), lambda frame: True,
        lambda domain_B, rows, replies: np.full(len(rows), 4.0), nearest, jax.random.key(0),
    )  # fmt: skip
    asked = [(each, "prefix") for each in kept]
    written = rehearsal_rounds._write(config.upgrade.writing, asked, tools, jax.random.split(tools.key))
    assert [(each.kept.frame.name, each.text) for each in written] == [("copy", "copy: abc"), ("add", "1 + 2")]
    assert kept[0].counts["prefix"]["unread"] == kept[1].counts["prefix"]["unread"] == 2


def test_the_form_fills_what_m0_cannot_write(config):
    config = with_old(config, form="copy: [a-e]{3}")
    kept, notes = rehearsal.write(config, ["old"], Stub(["nothing of the kind"]))
    assert not notes and len(kept["old"].rows) == 4
    assert {row["meta"]["rehearsal"]["source"] for row in kept["old"].rows} == {"form"}
    assert kept["old"].tries == {"prefix": 1, "described": 1, "form": 1}  # what gave nothing is not asked again


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("upgrade.rehearsal=yes", "upgrade.rehearsal"),
        ("upgrade.writing.reward=all", "expected one of agreement, none"),
        ("upgrade.writing.samples=1", "one reply agrees with itself"),
        ("upgrade.writing.agreement=0", "above 0 and at most 1"),
        ("upgrade.writing.least=999", "from 1 to prompts=256"),
        ("upgrade.writing.temperature=0", "above 0"),
    ],
)
def test_bad_values_are_one_line(override, said):
    with pytest.raises(ValueError, match=said):
        cli.compose_config("config", None, [override])


@pytest.mark.slow
def test_a_small_model_writes_and_answers_in_static_batches(save_small_model, tmp_path):
    save_small_model(tmp_path)
    numbers = [f"upgrade.writing.{each}" for each in ("prompts=4", "least=1", "tokens=6", "samples=4")]
    numbers += ["algorithm.max_new_tokens=6", "eval.batch=8"]  # so that writing and answering are one program
    config = cli.compose_config("config", None, [f"model.path={tmp_path / 'model'}", *numbers, "mesh=single"])
    m0 = M0(config)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    opened = m0.open_turn(turns, 6, jax.random.key(0))
    assert len(opened) == 6 and opened == m0.open_turn(turns, 6, jax.random.key(0))
    assert opened != m0.open_turn(turns, 6, jax.random.key(1))
    answered = m0.answer([[{"role": "user", "content": text}] for text in ("a", "a long one", "b")], jax.random.key(0))
    assert [len(replies) for replies in answered] == [4, 4, 4]
    assert m0.fits([{"role": "user", "content": "a" * 20}]) and not m0.fits([{"role": "user", "content": "a" * 30}])
    with pytest.raises(ValueError, match="apply_chat_template"):
        M0(dataclasses.replace(config, model=dataclasses.replace(config.model, apply_chat_template=False)))


@pytest.mark.slow
def test_the_shipped_model_writes_no_prompts_and_answers_those_of_a_form(tmp_path):
    stages = ["contamination.stages=[exact,near]", "upgrade.writing.prompts=64", "upgrade.writing.attempts=2"]
    stages += ["upgrade.writing.reward=agreement"]
    assert rehearsal.main([f"run.dir={tmp_path}", "--only", "copy,count", *stages]) == 0
    report = json.loads((tmp_path / "rehearsal" / "report.json").read_text())["domains"]["copy"]
    assert report["sources"]["prefix"]["kept"] == report["sources"]["described"]["kept"] == 0
    assert report["rows"] == report["kept_by_agreement"] == 64
    assert len(domains.read(str(tmp_path / "rehearsal" / "copy.jsonl"))) == 64
