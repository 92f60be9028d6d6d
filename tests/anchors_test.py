"""Grader drift: anchors, the exact test with its rate of false alarms, versions; and judges that change by stealth."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from rubric import anchors, versions
from rubric.anchor_keeper import AnchorConfig, Keeper, check
from rubric.anchors import Anchors, Baseline, Shift
from rubric.evaluator import RubricConfig, RubricEvaluator
from rubric.judge import Judge, JudgeConfig, SelfJudge
from rubric.schema import load

CONFIG = RubricConfig("graded", 1, 6.0)
NAN = np.nan


def fixed(domains):
    return Anchors(tuple(domains), ({"answer": "a"},) * len(domains), ("a",) * len(domains))


def baseline(grades, noisy=(), step=0, era=0, versions=None, groups=None):
    return Baseline(step, era, versions or {}, tuple(noisy), groups or {}, np.array(grades, float))


def by_all_signs(d):
    """The page's formula, by going through every sign."""
    total = abs(sum(d))
    signs = [*itertools.product((-1, 1), repeat=len(d))]
    return sum(abs(sum(s * abs(x) for s, x in zip(sign, d))) >= total - 1e-9 for sign in signs) / len(signs)


def test_the_sign_flip_test_is_exact():
    assert anchors.sign_flip_p(np.zeros(5)) == 1.0 and anchors.sign_flip_p(np.array([])) == 1.0
    assert anchors.sign_flip_p(np.ones(8)) == pytest.approx(2 / 256)
    assert anchors.sign_flip_p(np.array([1, 1, 1, -1.0])) == pytest.approx(10 / 16)  # 1 + 4 of 16, twice
    rng = np.random.default_rng(0)
    for size in (1, 3, 7, 10):
        d = rng.integers(-3, 4, size).astype(float)
        assert anchors.sign_flip_p(d) == pytest.approx(by_all_signs([x for x in d if x] or [0])), d
        d = np.round(rng.normal(size=size), 3)
        assert anchors.sign_flip_p(d) == pytest.approx(by_all_signs(d)), d


def test_false_alarms_stay_below_alpha_and_a_stricter_judge_is_seen():
    """Three noisy domains of 40 anchors, each grade moved by one with probability .2, up and down alike."""
    rng, alarms, seen, runs = np.random.default_rng(1), 0, 0, 400
    names = np.repeat(["a", "b", "c"], 40)
    held = fixed(names.tolist())

    def judged(true):
        return np.clip(true + rng.choice([-1, 0, 1], true.size, p=[0.1, 0.8, 0.1]), 1, 4).astype(float)

    for _ in range(runs):
        true = rng.integers(1, 5, 120)
        before = baseline(judged(true), noisy=("a", "b", "c"))
        same = anchors.compare(held, before, judged(true), {}, alpha=0.05)
        alarms += any(shift.drifted for shift in same)
        stricter = anchors.compare(held, before, judged(np.maximum(true - (names == "b"), 1)), {}, alpha=0.05)
        seen += stricter[1].drifted
    assert alarms / runs <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)
    assert seen / runs > 0.95


def test_an_exact_grader_drifts_with_its_first_other_grade():
    held = fixed(["a"] * 3 + ["b"] * 3)
    before = baseline([4, 3, NAN, 1, 2, 3], versions={"a": "v1", "b": "v1"})
    a, b = anchors.compare(held, before, np.array([4, 2, 3, 1, 2, NAN]), {"a": "v1", "b": "v2"}, 0.01)
    assert a == Shift("a", 2, 1, -0.5, -0.5, 0.0, True, False)
    assert b == Shift("b", 2, 0, 0.0, 0.0, 1.0, False, True)
    (event,) = anchors.events([a, b])
    assert (event["kind"], event["domain"], event["pass_shift"]) == ("grader_drift", "a", -0.5)
    json.dumps(event)
    moved = anchors.rebased([a, b], ["b", "a", "c"])
    assert moved["drifted_D"].tolist() == [False, True, False] and moved["shift_D"].tolist() == [0, -0.5, 0]


def test_the_next_baseline_takes_new_grades_only_where_there_is_drift():
    held = fixed(["a", "a", "b", "b"])
    before = baseline([4, 3, 3, NAN], noisy=("b",), era=1)
    after = np.array([4, 3, 2, 4.0])
    calm = anchors.compare(held, before, after, {"a": "v", "b": "v"}, 0.01)
    now = anchors.next_baseline(before, calm, held, after, {"a": "v", "b": "v"}, 20, {"a": 5})
    np.testing.assert_array_equal(now.grade_N, [4, 3, 3, 4])  # noise is not taken in, a grade that lacked is
    assert (now.step, now.era, now.versions, now.groups) == (20, 1, {"a": "v", "b": "v"}, {"a": 5})
    drifted = [calm[0], calm[1]._replace(drifted=True)]
    now = anchors.next_baseline(before, drifted, held, np.array([4, 3, 2, NAN]), {}, 20, {})
    np.testing.assert_array_equal(now.grade_N, [4, 3, 2, NAN])
    assert now.era == 2  # a judge's answers on disk are the old one's


def test_anchors_are_chosen_from_every_grade_in_turn():
    rows = [{"answer": str(number)} for number in range(8)]
    replies = ["r"] * 8
    rows[3] = rows[2]  # a reply that is there already
    held = anchors.choose(
        ["x", "y"], [0, 0, 0, 0, 0, 0, 1, 1], rows, replies, np.array([4, 4, 4, 4, 1, 2.5, 3, 3]),
        np.array([1, 1, 1, 1, 1, 1, 1, 0], bool), 4,
    )  # fmt: skip
    assert held.domains == ("x",) * 4 + ("y",)
    assert [row["answer"] for row in held.rows] == ["4", "5", "0", "1", "6"]


def test_the_file_gives_back_the_baseline_of_the_step_that_a_run_goes_on_from(tmp_path):
    path, held = tmp_path / "anchors.jsonl", fixed(["a", "b"])
    first = baseline([4, NAN], noisy=("b",), versions={"a": "v"}, groups={"a": 3})
    anchors.save(path, held, first)
    for step in (10, 20):
        anchors.append(path, first._replace(step=step, grade_N=np.array([step / 10, 1.0])))
    with open(path, "a") as file:
        file.write('{"step": 30, "gr')  # the power went
    again, found = anchors.load(path, 10)
    assert again == held and found.step == 10 and found.grade_N.tolist() == [1.0, 1.0]
    assert found.noisy == ("b",) and found.groups == {"a": 3}
    _, found = anchors.load(path, 25)
    assert found.step == 10  # the baseline of step 20 went when the run was continued from 10
    _, found = anchors.load(path, 9)
    np.testing.assert_array_equal(found.grade_N, [4, NAN])
    for at, error, message in ((-1, ValueError, "no baseline of step -1"), (0, FileNotFoundError, "without anchors")):
        with pytest.raises(error, match=message):
            anchors.load(path if at else tmp_path / "none", at)
    path.write_text("no JSON\n")
    with pytest.raises(ValueError, match=r"anchors.jsonl:1: not a JSON object"):
        anchors.load(path, 0)


def test_a_silently_updated_judge_is_told_from_an_exact_grader():
    mood = {"grade": 4}
    judge = SelfJudge(lambda chats: [json.dumps({"grade": mood["grade"], "reason": "-"}) for _ in chats])
    constrained = {"answer": "-", "meta": {"constraints": [{"kind": "lowercase"}]}}
    names = ["prose", "facts"]
    words = "alder birch cedar dogwood elder fir gorse hazel ivy juniper".split()
    rows = [constrained] * 10 + [{"answer": "a"}] * 4
    replies = [f"the {word} stands alone" for word in words] + ["a", "A.", "b", "c"]
    domain_B = np.array([0] * 10 + [1] * 4)
    with RubricEvaluator(["eq", "eq"], CONFIG, [load("creative_judged"), None], judge) as evaluator:
        grades = evaluator.grade(domain_B, rows, replies)
        held = anchors.choose(names, domain_B, rows, replies, grades.grade_B, grades.valid_B, 12)
        first, second = (anchors.regrade(evaluator, names, held) for _ in range(2))
        noisy = anchors.noisy(held, first, second, ["prose"])
        now = dict(zip(names, evaluator.versions()))
        start = Baseline(0, 0, now, noisy, {}, first)
        assert noisy == ("prose",) and not anchors.events(anchors.compare(held, start, second, now, 0.01))
        mood["grade"] = 1
        shifts = anchors.compare(held, start, anchors.regrade(evaluator, names, held), now, 0.01)
    prose, facts = shifts
    assert prose.drifted and not prose.version_changed and not facts.drifted
    assert (prose.n, prose.changed, prose.grade_shift, prose.pass_shift) == (10, 10, -2.0, -1.0)
    assert prose.p == pytest.approx(2 / 1024)


def test_a_run_that_keeps_anchors(tmp_path):
    """A grader's file is changed at step 25: seen by its version, and re-based with the groups since step 20."""
    own = tmp_path / "own.py"
    own.write_text("def grade(reply, answer, meta): return 4 if reply == answer else 1\n")
    names, config = ["mine", "facts"], AnchorConfig(each=4, every=10, alpha=0.01)
    rows = [{"answer": str(number)} for number in range(4)] * 2
    replies, domain_B, path = ["x", "y", "z", "w"] * 2, [0] * 4 + [1] * 4, tmp_path / "anchors.jsonl"
    with RubricEvaluator([str(own), "eq"], CONFIG) as evaluator:
        keeper = Keeper.start(path, evaluator, names, config, domain_B, rows, replies)
        assert keeper.anchors.replies[:4] == ("x", "0", "y", "1")  # the answers stand in for replies of grade 4
        assert keeper.baseline.noisy == () and not keeper.due(7) and keeper.due(7, ["facts"]) and keeper.due(20)
        found = keeper.check(20, {"mine": 40, "facts": 40})
        assert found.events == [] and not found.drifted_D.any()
    own.write_text("def grade(reply, answer, meta): return 2 if reply == answer else 1\n")
    with RubricEvaluator([str(own), "eq", "number"], CONFIG) as evaluator:  # a domain added then has no other version
        assert Keeper.resume(path, evaluator, [*names, "added"], config, 25).changed() == ["mine"]
    with RubricEvaluator([str(own), "eq"], CONFIG) as evaluator:
        keeper = Keeper.resume(path, evaluator, names, config, 25)
        assert keeper.baseline.step == 20 and keeper.due(25)
        found = keeper.check(25, {"mine": 46, "facts": 50})
        assert found.drifted == {"mine"} and found.events[0]["version_changed"]
        assert found.drifted_D.tolist() == [True, False] and found.shift_D.tolist() == [-0.5, 0.0]
        assert found.grade_shift_D.tolist() == [-1.0, 0.0] and found.groups_D.tolist() == [6, 10]
        assert not keeper.due(26) and keeper.check(30, {}).events == []


def test_a_new_era_begins_with_a_drifted_judge(tmp_path, monkeypatch):
    monkeypatch.setenv("U", "http://127.0.0.1:9/v1")
    judge = Judge(JudgeConfig("m", "U", "K", "none", 0.0, 9, 1, 1, 1.0, 1.0, 0, 1.0, ""))
    with RubricEvaluator(["eq"], CONFIG, [load("creative_judged")], judge) as evaluator:
        held = fixed(["a"])
        Keeper(tmp_path / "x", evaluator, ["a"], AnchorConfig(1, 1, 0.1), held, baseline([4], noisy=("a",), era=3))
        assert judge.era == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [((-1, 1, 0.1), "anchors.each=-1"), ((1, 0, 0.1), "anchors.every=0"), ((1, 1, 1.0), "anchors.alpha=1.0")],
)
def test_impossible_settings_are_one_line(given, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        check(AnchorConfig(*given))


def test_a_grader_of_the_users_own_that_throws_dice_is_noisy():
    held = fixed(["a", "b", "b"])
    assert anchors.noisy(held, np.array([4, 3, NAN]), np.array([4, 2, 3.0]), ["c"]) == ("b",)


def test_a_version_is_of_all_that_grades(tmp_path):
    own = tmp_path / "own.py"
    own.write_text("def grade(reply, answer, meta): return 4\n")
    rubric = tmp_path / "mine.yaml"
    text = "about: x\ngrades: {2: .2, 3: .5, 4: 1}\ncriteria:\n  a:\n    check: own.py\n  b:\n    check: environment\n"
    rubric.write_text(text)
    mine = load(str(rubric))
    judge = JudgeConfig("m", "U", "K", "none", 0.0, 9, 1, 1, 1.0, 1.0, 0, 1.0, "")
    judged = load("creative_judged")
    seen = [
        versions.of_domain("eq", None),
        versions.of_domain("orz", None),
        versions.of_domain(str(own), None),
        versions.of_domain("eq", mine),
        versions.of_domain("orz", mine),
        versions.of_domain("eq", judged, judge),
        versions.of_domain("eq", judged, dataclasses.replace(judge, model="n")),
        versions.of_domain("eq", judged, dataclasses.replace(judge, votes=3)),
    ]
    own.write_text("def grade(reply, answer, meta): return 3\n")
    seen += [versions.of_domain(str(own), None), versions.of_domain("eq", mine)]
    rubric.write_text(text.replace(".5", ".6"))
    seen.append(versions.of_domain("eq", load(str(rubric))))
    assert len(set(seen)) == len(seen) and all(len(each) == 16 for each in seen)
    own.write_text("def grade(reply, answer, meta): return 4\n")
    rubric.write_text(text + "# a remark\n")
    assert versions.of_domain("eq", load(str(rubric))) == seen[3]
    faster = dataclasses.replace(judge, concurrency=9, base_url_env="V", cache="c")
    assert versions.of_domain("eq", judged, faster) == seen[5]
