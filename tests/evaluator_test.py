"""The evaluator against hand-worked batches, and against graders that raise, hang, die or cannot even be loaded."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml

from rubric import grading, pool, schema
from rubric.evaluator import RubricConfig, RubricEvaluator, check
from rubric.grading import Task
from rubric.verify import GRADERS

ROOT = Path(__file__).resolve().parents[1]
OWN = """
    import os, signal, sys, time

    def grade(reply, answer, meta):
        if reply == "hang":
            while True: pass
        if reply == "sleep": time.sleep(3600)
        if reply == "stop": os.kill(os.getpid(), signal.SIGSTOP)
        if reply == "die": os._exit(3)
        if reply == "killed": os.kill(os.getpid(), signal.SIGKILL)
        if reply == "raise": raise RuntimeError("no such\\nthing")
        if reply == "exit": sys.exit(1)
        if reply == "none": return None
        if reply == "jax": return 1 if "jax" in sys.modules else 4
        if reply == "main": return 1 if hasattr(sys.modules["__main__"], "MARK") else 4
        if reply == "pid": return 1 + os.getpid() % 2
        print("a grader may print")
        return float(reply) + meta.get("more", 0) + len(answer)
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("rubrics") / "own.py"
    path.write_text(textwrap.dedent(OWN))
    return str(path)


@pytest.fixture(scope="module")
def evaluator(own):
    with RubricEvaluator(["eq", "orz", "python_tests", own], RubricConfig("graded", 2, 10.0)) as evaluator:
        yield evaluator


@pytest.fixture(scope="module")
def hasty(own):
    """One second a row, and workers that start fast because they load no computer algebra."""
    with RubricEvaluator([own, "eq"], RubricConfig("graded", 2, 1.0)) as evaluator:
        yield evaluator


def test_a_mixed_batch_by_hand(evaluator):
    rows = [
        {"answer": "Paris"},
        {"answer": "19"},
        {"answer": None, "meta": {"entry": "f", "tests": [{"args": [1], "expect": 2}]}},
        {"answer": "", "meta": {"more": 1.0}, "messages": []},
        {"answer": "Paris", "meta": None},
        {"answer": "19"},
    ]
    replies = ["paris.", "\\boxed{19}", "def f(x): return 3", "1.5", "Rome", "I pass"]
    grades = evaluator.grade(np.array([0, 1, 2, 3, 0, 1], np.int32), rows, replies)
    np.testing.assert_allclose(grades.grade_B, [3, 4, 2, 2.5, 1, 1])
    np.testing.assert_allclose(grades.reward_B, [2 / 3, 1, 1 / 3, 0.5, 0, 0], rtol=1e-6)
    assert grades.valid_B.all()
    assert (grades.grade_B.dtype, grades.reward_B.dtype, grades.valid_B.dtype) == (np.float32, np.float32, bool)
    assert not evaluator.failures


def test_an_empty_batch_has_no_grades(evaluator):
    assert [array.shape for array in evaluator.grade(np.zeros(0, np.int32), [], [])] == [(0,)] * 3


def test_pass_reward_is_one_from_grade_three():
    with RubricEvaluator(["list"], RubricConfig("pass", 0, 1.0)) as evaluator:
        replies = ["3, 5, 8", "3 5 8", "8, 5, 3", "none"]
        grades = evaluator.grade(np.zeros(4, np.int32), [{"answer": "3, 5, 8"}] * 4, replies)
    np.testing.assert_array_equal(grades.grade_B, [4, 3, 2, 1])
    np.testing.assert_array_equal(grades.reward_B, [1, 1, 0, 0])


def test_order_is_kept_over_many_chunks(evaluator):
    numbers = np.arange(300) % 7
    rows = [{"answer": "x" * int(number % 3)} for number in numbers]
    grades = evaluator.grade(np.full(300, 3), rows, ["1.25"] * 300)
    np.testing.assert_allclose(grades.grade_B, 1.25 + numbers % 3)


def test_workers_know_neither_jax_nor_the_main_module(evaluator):
    grades = evaluator.grade(np.full(8, 3), [{"answer": ""}] * 8, ["jax", "main"] * 4)
    np.testing.assert_array_equal(grades.grade_B, 4)


def test_a_main_module_that_imports_jax_is_not_imported_again(own, tmp_path):
    script = tmp_path / "main.py"  # without the guard that multiprocessing's spawn would need
    script.write_text(
        textwrap.dedent(f"""
        import sys
        import jax
        from rubric.evaluator import RubricConfig, RubricEvaluator
        MARK = print("imported once")
        evaluator = RubricEvaluator([{own!r}], RubricConfig("graded", 1, 30.0))
        print("jax" in sys.modules, evaluator.grade([0, 0], [{{"answer": ""}}] * 2, ["jax", "main"]).grade_B)
        evaluator.close()
        """)
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[:2] == ["imported once", "True [4. 4.]"], done.stderr


def test_rows_that_cannot_be_graded_are_invalid_and_the_others_graded(hasty):
    hasty.failures.clear()
    replies = ["1.5", "raise", "hang", "2.5", "die", "killed", "sleep", "exit", "stop", "none", "9", "nan", "3.5"]
    rows = [{"answer": ""}] * len(replies) + [{"answer": ""}, {"answer": "a"}, {"answer": {1, lambda: 0}}]
    domains = np.array([0] * len(replies) + [1, 1, 0])
    start = time.monotonic()
    grades = hasty.grade(domains, rows, [*replies, "a", "a", "1"])
    assert time.monotonic() - start < 20.0
    valid = np.array([reply[0].isdigit() and reply != "9" for reply in replies] + [False, True, False])
    np.testing.assert_array_equal(grades.valid_B, valid)
    np.testing.assert_array_equal(grades.grade_B[valid], [1.5, 2.5, 3.5, 4.0])
    np.testing.assert_array_equal(grades.grade_B[~valid], 1.0)
    np.testing.assert_array_equal(grades.reward_B[~valid], 0.0)
    reasons = {(domain, reason.split(": 'float")[0]): number for (domain, reason), number in hasty.failures.items()}
    unpicklable = [key for key in reasons if "pickle" in key[1] or "lambda" in key[1]]
    assert len(unpicklable) == 1 and reasons.pop(unpicklable[0]) == 1
    none = [key for key in reasons if key[1].startswith("TypeError: float()")]
    assert len(none) == 1 and reasons.pop(none[0]) == 1
    empty = "ValueError: answer '' is empty: give the right answer, or a list of right answers"
    assert reasons == {
        (0, "RuntimeError: no such thing"): 1,
        (0, "timeout: over 1 s"): 3,
        (0, "worker process died with status 3"): 1,
        (0, "worker process died with status -9"): 1,
        (0, "SystemExit: 1"): 1,
        (0, f"grade 9 is outside the scale 1 to 4: {grading.OF_REWARD}"): 1,
        (0, f"grade nan is outside the scale 1 to 4: {grading.OF_REWARD}"): 1,
        (1, empty): 1,
    }


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (True, "the grader returned True, and grades are 1 to 4"),
        (False, "the grader returned False, and grades are 1 to 4"),
        (np.bool_(True), "the grader returned True, and grades are 1 to 4"),
        (0, "grade 0 is outside the scale 1 to 4"),
        (0.5, "grade 0.5 is outside the scale 1 to 4"),
    ],
)
def test_a_reward_is_no_grade_and_the_reason_says_how_to_give_one(returned, reason):
    """True as a grade would be 1, the worst: the signal the wrong way round."""
    result = grading.graded(lambda reply, answer, meta: returned, Task("own.py", "a", "a", {}))
    assert result == (None, f"{reason}: {grading.OF_REWARD}")
    assert "1 + 3 * reward" in grading.OF_REWARD and "def reward_fn(messages, answer)" in grading.OF_REWARD


def test_workers_that_die_between_batches_are_replaced(hasty):
    for worker in hasty._pool._workers:
        worker.process.kill()
        worker.process.wait()
    grades = hasty.grade(np.zeros(5, np.int32), [{"answer": ""}] * 5, ["2"] * 5)
    assert grades.valid_B.all() and (grades.grade_B == 2).all()


def test_an_interrupted_call_leaves_nothing_behind(hasty):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            hasty.grade(np.zeros(2, np.int32), [{"answer": ""}] * 2, ["sleep"] * 2)
    finally:
        signal.signal(signal.SIGALRM, before)
    grades = hasty.grade(np.zeros(3, np.int32), [{"answer": ""}] * 3, ["2", "3", "4"])
    np.testing.assert_array_equal(grades.grade_B, [2, 3, 4])


def test_an_environment_that_answers_nothing_is_given_up(own, monkeypatch):
    monkeypatch.setattr(pool, "IN_A_ROW", 2)
    with RubricEvaluator([own], RubricConfig("graded", 1, 0.5)) as evaluator:
        grades = evaluator.grade(np.zeros(500, np.int32), [{"answer": ""}] * 500, ["hang"] * 500)
        assert not grades.valid_B.any()
        assert evaluator.failures[0, "timeout: over 0.5 s"] == 2
        assert evaluator.failures[0, "given up: the 2 rows before it were lost"] == 498
        assert evaluator.grade([0], [{"answer": ""}], ["4"]).valid_B.all()  # the next batch tries again


def test_a_file_that_fails_to_load_makes_its_rows_invalid(tmp_path):
    broken, deadly = tmp_path / "broken.py", tmp_path / "deadly.py"
    broken.write_text("import no_such_package\ndef grade(reply, answer, meta): return 4.0\n")
    deadly.write_text("import os\nos._exit(7)\ndef grade(reply, answer, meta): return 4.0\n")
    for path, reason in (
        (broken, "ModuleNotFoundError: No module named 'no_such_package'"),
        (deadly, "no worker process starts"),
    ):
        with RubricEvaluator([str(path), "eq"], RubricConfig("graded", 1, 5.0)) as evaluator:
            grades = evaluator.grade([0, 1], [{"answer": "a"}] * 2, ["a", "a"])
            assert grades.valid_B.tolist() == [False, True]
            assert evaluator.failures == {(0, reason): 1}


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("# a remark\nimport no_such_package\n", r":2: ModuleNotFoundError: No module named 'no_such_package'"),
        ("def of(x): return 1 / x\nTOP = of(0)\n", r":1: ZeroDivisionError: division by zero"),
        ("import os\nos._exit(7)\n", r": no worker process starts: it ends or hangs on import"),
        ("grade = 3\nif False:\n    pass\n#", r": TypeError: `grade` is no function"),
    ],
)
def test_a_file_that_fails_to_load_is_refused_before_the_first_step(tmp_path, source, reason):
    path = tmp_path / "own.py"
    path.write_text(source + "def grade(reply, answer, meta): return 4.0\n")
    evaluator = RubricEvaluator(["eq", str(path)], RubricConfig("graded", 2, 5.0))
    where = re.escape(f"domains[1].environment: the grader cannot be loaded, {path}")
    with pytest.raises(ValueError, match=where + re.escape(reason) + ": mend the file") as caught:
        evaluator.require_loaded()
    assert "\n" not in str(caught.value)
    evaluator.close()  # a second time: nothing is left


def test_a_rubrics_file_is_refused_as_the_domains_rubric(tmp_path):
    (tmp_path / "own.py").write_text("import no_such_package\ngrade = max\n")
    (tmp_path / "own.yaml").write_text(
        "about: x\ngrades: {2: 0.25, 3: 0.6, 4: 0.95}\ncriteria:\n  a: {check: own.py}\n"
    )
    rubric = schema.load(str(tmp_path / "own.yaml"))
    with pytest.raises(ValueError, match=r"domains\[0\].rubric: the grader cannot be loaded, .*own.py:1: Module"):
        RubricEvaluator([None], RubricConfig("graded", 1, 5.0), [rubric]).require_loaded()


def test_graders_that_load_are_not_refused(evaluator):
    evaluator.require_loaded()
    with RubricEvaluator(["eq"], RubricConfig("graded", 0, 1.0)) as here:
        here.require_loaded()


def test_a_relative_path_and_a_neighbour_module_work(tmp_path, monkeypatch):
    (tmp_path / "scale_of_mine.py").write_text("TOP = 4\n")
    (tmp_path / "json.py").write_text("from scale_of_mine import TOP\ngrade = lambda reply, answer, meta: TOP\n")
    monkeypatch.chdir(tmp_path)
    with RubricEvaluator(["json.py"], RubricConfig("graded", 1, 5.0)) as evaluator:
        monkeypatch.chdir("/")
        assert evaluator.grade([0], [{"answer": "a"}], ["a"]).reward_B.tolist() == [1.0]


def test_reasons_do_not_fill_the_memory():
    with RubricEvaluator(["eq", "number"], RubricConfig("graded", 0, 1.0)) as evaluator:
        rows = [{"answer": f"no {number}"} for number in range(300)]
        assert not evaluator.grade(np.ones(300, np.int32), rows, ["1"] * 300).valid_B.any()
        assert evaluator.failures.total() == 300 and len(evaluator.failures) <= 201
        assert evaluator.failures[1, "other reasons"] == 100


@pytest.mark.parametrize(
    ("environments", "reward", "workers", "timeout_s", "message"),
    [
        (["eq", "orzz"], "graded", 1, 5.0, r"domains\[1\].environment 'orzz' is unknown: did you mean 'orz'\?"),
        (["jsoncall"], "graded", 1, 5.0, r"domains\[0\].environment 'jsoncall' .* 'json_call'"),
        (["zzz"], "graded", 1, 5.0, "is unknown: use one of eq, "),
        (["no_such.py"], "graded", 1, 5.0, r"domains\[0\].environment 'no_such.py': there is no such file"),
        (["eq"], "binary", 1, 5.0, "rubric.reward 'binary' is unknown: use graded or pass"),
        (["eq"], "graded", -2, 5.0, "rubric.workers -2"),
        (["eq", "orz"], "graded", 0, 5.0, "rubric.workers 0: environment 'orz' can hang"),
        (["eq"], "graded", 1, 0.0, "rubric.timeout_s 0.0"),
        (["python_tests"], "graded", 1, 3.0, "rubric.timeout_s 3 is no longer than the 4 s a program"),
    ],
)
def test_impossible_settings_end_with_one_line(environments, reward, workers, timeout_s, message):
    with pytest.raises(ValueError, match=message) as caught:
        check(environments, RubricConfig(reward, workers, timeout_s))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def judge(reply): return 1\n", "defines no `grade`"),
        ("def grade(reply:\n", r"is not valid Python: .*own.py:1"),
        ("from math import floor as grade\n", None),
        ("grade = max\n", None),
    ],
)
def test_a_users_file_is_read_before_the_run(tmp_path, source, message):
    path = tmp_path / "own.py"
    path.write_text(source)
    config = RubricConfig("graded", 1, 5.0)
    if message is None:
        return check([str(path)], config)
    with pytest.raises(ValueError, match=message) as caught:
        check([str(path)], config)
    assert "\n" not in str(caught.value)


def test_batches_of_unequal_lengths_are_refused(evaluator):
    with pytest.raises(ValueError, match="2 domains, 1 rows and 1 replies"):
        evaluator.grade(np.zeros(2, np.int32), [{}], ["a"])


def test_the_default_settings_fit_every_environment():
    settings = yaml.safe_load((ROOT / "configs/rubric/default.yaml").read_text())
    assert settings.keys() == {field.name for field in fields(RubricConfig)}
    check(list(GRADERS), RubricConfig(**settings))


def test_cheap_rows_take_no_worker_and_little_time():
    with RubricEvaluator(["eq"], RubricConfig("graded", -1, 5.0)) as evaluator:
        assert evaluator._pool is None
        rows, replies = [{"answer": "New York"}] * 2048, ["It is new york, I think."] * 2048
        seconds = []
        for _ in range(5):
            start = time.process_time()
            evaluator.grade(np.zeros(2048, np.int32), rows, replies)
            seconds.append(time.process_time() - start)
        assert min(seconds) < 0.05


def test_a_task_is_answered_or_given_a_reason():
    assert grading.graded(lambda reply, answer, meta: 3, Task("eq", "", None, {})) == (3.0, "")
    assert grading.graded(lambda reply, answer, meta: 0.5, Task("eq", "", None, {})).grade is None
