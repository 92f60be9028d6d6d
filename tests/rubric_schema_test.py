"""Rubrics read from YAML: every wrong value is one line with file:line, key and remedy. And what a row's grade is."""

import textwrap

import numpy as np
import pytest

from rubric import scoring
from rubric.checks import CHECKS, Checked
from rubric.evaluator import RubricConfig, RubricEvaluator, check
from rubric.judge import JudgeConfig
from rubric.schema import load

GOOD = """\
about: Anything
grades: {2: 0.25, 3: 0.5, 4: 1.0}
criteria:
  first:
    check: eq
    weight: 2
    veto: 2
    log: exact_match
  second:
    check: constraint
    kind: max_words
    n: 3
    part: form
  third:
    check: match
    by: f1
    weight: 0
    where: extra
    log: [f1]
"""
CONFIG = RubricConfig("graded", 1, 6.0)


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_a_rubric_is_what_its_file_says(written):
    rubric = load(written(GOOD))
    assert (rubric.name, rubric.about, rubric.grades) == ("mine", "Anything", (0.25, 0.5, 1.0))
    first, second, third = rubric.criteria
    assert (first.check.name, first.weight, first.veto, first.passes, first.part) == ("eq", 2.0, 2, 0.6, "content")
    assert second.check.given() == {"kind": "max_words", "n": 3} and second.veto == 4
    assert third.where == "extra" and rubric.measures == ("exact_match", "f1")
    assert hash(rubric) == hash(load(written(GOOD + "# a remark\n")))


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("check: eq", "check: eqq", 5, "criteria.first.check='eqq': did you mean 'eq'?"),
        ("check: eq", "check: [eq]", 5, "criteria.first.check=['eq']: expected text"),
        ("weight: 2", "weight: -1", 6, "criteria.first.weight=-1: give a number from 0"),
        ("weight: 2", "weight: much", 6, "criteria.first.weight='much'"),
        ("weight: 2", "wieght: 2", 6, "criteria.first.wieght=2: is no key of a criterion and no option of check 'eq'"),
        ("veto: 2", "veto: yes", 7, "criteria.first.veto=True: give the highest grade"),
        ("log: exact_match", "log: f1", 8, "criteria.first.log='f1': eq measures exact_match"),
        ("kind: max_words", "kind: max_word", 11, "criteria.second.kind='max_word': use one of uppercase,"),
        ("    n: 3\n", "", 10, "criteria.second.n: is missing: the constraint max_words needs it"),
        ("n: 3", "n: few", 12, "criteria.second.n='few': expected a whole number"),
        ("n: 3", "n: true", 12, "criteria.second.n=True: expected a whole number"),
        ("part: form", "part: shape", 13, "criteria.second.part='shape': use content or form"),
        ("    by: f1\n", "", 15, "criteria.third.by: is missing: check 'match' needs it, text"),
        ("log: [f1]", "log: [f1, exact_match]", 4, "criteria.third.log: exact_match is logged by first already"),
        ("2: 0.25, 3", "3", 2, "grades={3: 0.5, 4: 1.0}: give the score from which each is reached"),
        ("2: 0.25", "2: 0.75", 2, "scores lie above 0, at most at 1, and do not fall"),
        ("about: Anything", "abuot: Anything", 1, "abuot: is no key of a rubric: did you mean 'about'?"),
        ("about: Anything\n", "", 1, "about: is missing"),
        ("  second:", "  first:", 9, "criteria.first: stands twice"),
        ("  second:", "  sec/ond:", 10, "the name becomes part of a metric"),
        ("criteria:\n", "criteria: [\n", 5, "not YAML: expected"),
        ("weight: 2", "weight: 0\n    #", 4, "criteria: has no criterion of a weight above 0"),
    ],
)
def test_one_line_says_where_and_what(written, old, new, line, message):
    text = GOOD.replace(old, new, 1)
    if "has no criterion" in message:
        text = text.replace("n: 3", "n: 3\n    weight: 0")
    path = written(text)
    with pytest.raises(ValueError) as caught:
        load(path)
    said = str(caught.value)
    assert message in said and "\n" not in said
    place = int(said.removeprefix(f"{path}:").split(":")[0])
    assert place == line, said


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("maths", "domains[0].rubric='maths': did you mean 'math'?, or the path of a .yaml file"),
        ("no_such.yaml", "domains[0].rubric='no_such.yaml': no such file"),
    ],
)
def test_an_unknown_rubric_is_named(source, message):
    with pytest.raises(ValueError) as caught:
        load(source, "domains[0].rubric")
    assert message in str(caught.value)


def test_an_empty_file_and_a_wrong_pattern(written):
    with pytest.raises(ValueError, match=r"mine.yaml:1: the file is empty"):
        load(written(""))
    with pytest.raises(ValueError, match=r"mine.yaml:6: criteria.first.pattern='\(': is no regular expression"):
        load(written(GOOD.replace("check: eq", "check: regex\n    pattern: (").replace("log: exact_match", "pass: 1")))


def test_what_cannot_be_graded_is_refused_before_a_run(written, tmp_path):
    judged = load("creative_judged")
    for rubrics, config, message in (
        ([load("code")], RubricConfig("graded", 0, 6.0), "rubric.workers 0: domains[0].rubric 'code': check"),
        ([load("code")], RubricConfig("graded", 1, 3.0), "rubric.timeout_s 3 is no longer than the 4 s"),
        ([judged], CONFIG, "domains[0].rubric 'creative_judged' asks a judge: set rubric=judge"),
        ([None, None], CONFIG, "1 environments and 2 rubrics"),
    ):
        with pytest.raises(ValueError) as caught:
            check(["eq"], config, rubrics)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "own.py").write_text("x = 1\n")
    own = load(written(GOOD.replace("check: eq", "check: own.py")))
    with pytest.raises(ValueError, match=r"rubric 'mine': criteria.first.check .*own.py' defines no `grade`"):
        check(["eq"], CONFIG, [own])
    check(["orz"], RubricConfig("graded", 0, 6.0), [load("knowledge")])  # its environment grades nothing


def test_a_judge_is_checked_without_a_word_of_its_secrets(monkeypatch):
    judge = JudgeConfig("m", "NO_SUCH_URL", "NO_KEY", "json_schema", 0.0, 9, 1, 1, 1.0, 1.0, 0, 1.0, "")
    monkeypatch.delenv("NO_SUCH_URL", raising=False)
    with pytest.raises(ValueError, match=r"rubric.judge.base_url_env='NO_SUCH_URL': this environment variable is not"):
        check(["eq"], RubricConfig("graded", 1, 6.0, judge), [load("creative_judged")])
    monkeypatch.setenv("NO_SUCH_URL", "secret-host")
    with pytest.raises(ValueError) as caught:
        check(["eq"], RubricConfig("graded", 1, 6.0, judge), [load("creative_judged")])
    assert "secret-host" not in str(caught.value)


def scored(score, **measures):
    return Checked(score, "" if score is not None else "lost", measures)


@pytest.mark.parametrize(
    ("first", "second", "third", "grade", "score"),
    [
        (1.0, 1.0, None, 4.0, 1.0),
        (2 / 3, 1.0, 0.0, 3.0, 7 / 9),  # a criterion of weight 0 counts for nothing
        (2 / 3, 0.0, None, 2.0, 4 / 9),
        (1 / 3, 1.0, None, 2.0, 5 / 9),  # 5/9 would be a 3: the first criterion's veto
        (0.0, 0.5, None, 1.0, 1 / 6),
    ],
)
def test_a_rows_grade_by_hand(written, first, second, third, grade, score):
    row = {"first": scored(first), "second": scored(second)} | ({} if third is None else {"third": scored(third)})
    got = scoring.grade(load(written(GOOD)), row)
    assert got.grade == grade and got.score == pytest.approx(score) and got.reason == ""


def test_a_lost_criterion_makes_the_row_invalid_where_it_matters(written):
    rubric = load(written(GOOD))
    one, lost = scored(1.0), scored(None)
    assert scoring.grade(rubric, {"first": one, "second": lost}).reason == "second: lost"
    assert scoring.grade(rubric, {"first": one, "second": one, "third": lost}).grade == 4.0
    fatal = load(written(GOOD.replace("veto: 2", "veto: 1")))
    assert scoring.grade(fatal, {"first": scored(0.0), "second": lost}).grade == 1.0
    assert scoring.grade(fatal, {"first": lost, "second": lost}).grade is None
    apart = load(
        written(GOOD.replace("weight: 2", "weight: 2\n    where: extra").replace("n: 3", "n: 3\n    where: b"))
    )
    assert scoring.grade(apart, {}).reason == "no criterion of the rubric applies to the row"


def test_a_batch_of_domains_with_and_without_rubrics(written, tmp_path):
    (tmp_path / "own.py").write_text(
        textwrap.dedent(
            """
            def grade(reply, answer, meta):
                if reply == "fall": raise RuntimeError("fell")
                return 4 if reply == answer else 2
            """
        )
    )
    mine = load(written(GOOD))
    own = load(written(GOOD.replace("check: eq", "check: own.py")))
    around = load(written(GOOD.replace("check: eq", "check: environment")))
    rows = [{"answer": "a b"}, {"answer": "a b", "meta": {"extra": 1}}, {"answer": "a b"}, {"answer": "a b"}] * 2
    replies = ["a b", "A b", "a c", "", "fall", "a b", "a c", "x y z w"]
    domains = np.array([0, 1, 1, 1, 2, 2, 3, 3])
    with RubricEvaluator(["eq", "eq", "eq", "line"], CONFIG, [None, mine, own, around]) as evaluator:
        got = evaluator.score(domains, rows, replies)
        np.testing.assert_array_equal(evaluator.grade(domains, rows, replies).grade_B, got.grades.grade_B)
    # eq: 4; mine: eq 3 -> (2*2/3+1)/3 = 7/9; eq 2 -> 5/9, vetoed; eq 1, empty reply keeps no constraint -> 0
    np.testing.assert_array_equal(got.grades.grade_B, [4, 3, 2, 1, 1, 4, 2, 1])
    np.testing.assert_array_equal(got.grades.valid_B, [1, 1, 1, 1, 0, 1, 1, 1])
    assert evaluator.failures == {(2, "first: RuntimeError: fell"): 2}
    assert got.scores_BK.shape == (8, 6) and np.isnan(got.scores_BK[0]).all() and np.isnan(got.scores_BK[4, 0])
    one = scoring.of_domain(mine, got.scores_BK[domains == 1])
    np.testing.assert_allclose(one.score_N, [7 / 9, 5 / 9, 0], rtol=1e-6)
    np.testing.assert_allclose(one.criteria_NC, [[2 / 3, 1, 1], [1 / 3, 1, np.nan], [0, 0, np.nan]], rtol=1e-6)
    np.testing.assert_allclose(one.measures_NM, [[1, 1], [0, np.nan], [0, np.nan]])
    row = scoring.metrics(mine, one, "d", "eval/")
    assert row["eval/criterion_second/d"] == pytest.approx(2 / 3)
    assert row["eval/score/d"] == pytest.approx((7 / 9 + 5 / 9) / 3)
    assert (row["eval/exact_match/d"], row["eval/f1/d"]) == (pytest.approx(1 / 3), 1.0)
    nothing = scoring.metrics(mine, scoring.of_domain(mine, got.scores_BK[:0]), "d")
    assert set(nothing.values()) == {None} and nothing.keys() == {key.removeprefix("eval/") for key in row}


def test_a_conversation_graded_elsewhere_takes_the_environments_place(written):
    from rubric.grading import Result

    around = load(written(GOOD.replace("check: eq", "check: environment")))
    with RubricEvaluator([None, None], CONFIG, [around, None]) as evaluator:
        rows, replies = [{"answer": "a"}] * 4, ["a", "a", "a", "a"]
        graded = {0: Result(4.0, ""), 1: Result(None, "down"), 3: Result(2.5, "")}
        got = evaluator.score([0, 0, 0, 1], rows, replies, graded)
    np.testing.assert_array_equal(got.grades.valid_B, [True, False, False, True])
    np.testing.assert_array_equal(got.grades.grade_B, [4, 1, 1, 2.5])
    assert (0, "first: its environment graded no conversation") in evaluator.failures


def test_a_check_that_hangs_costs_its_row_only(written):
    text = GOOD.replace("check: eq", "check: regex\n    pattern: (a|aa)+$").replace("log: exact_match", "pass: 1")
    with RubricEvaluator(["eq"], RubricConfig("graded", 1, 1.0), [load(written(text))]) as evaluator:
        got = evaluator.score([0, 0], [{"answer": "a"}] * 2, ["a" * 60 + "b", "aa"])
    assert got.grades.valid_B.tolist() == [False, True] and got.grades.grade_B[1] == 4.0
    assert evaluator.failures == {(0, "first: timeout: over 1 s"): 1}


def test_every_check_has_words_for_its_options():
    for name, kind in CHECKS.items():
        assert all(option.expected for option in kind.options.values()), name
        assert len(set(kind.measures)) == len(kind.measures)
