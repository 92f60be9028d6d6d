"""Tests as statements against a program in another process: what crosses, what passes, and what cannot be cheated."""

import json
import os
import subprocess
import sys
from collections import Counter, OrderedDict, namedtuple
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rubric import sandbox

NEIGHBOURS = os.path.dirname(sandbox.__file__)


@pytest.fixture(scope="module")
def module():
    sys.path.insert(0, NEIGHBOURS)
    import sandbox_tests

    sys.path.remove(NEIGHBOURS)
    return sandbox_tests


def outcomes(program: str, *tests: str, setup: str = "", entry: str = "f") -> list:
    ran = sandbox.run_tests([program], entry, tests, setup, cpu_s=1, wall_s=1.5)
    return [True if call.returned else call.value for call in ran.calls] if not ran.failure else ran.failure


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
SCALARS |= st.complex_numbers(allow_nan=False)
KEYS = SCALARS | st.tuples(SCALARS, SCALARS) | st.frozensets(SCALARS, max_size=2)
VALUES = st.recursive(
    KEYS | st.sets(KEYS, max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_plain_values_come_back_as_they_are(module, value):
    back = module.value_of(json.loads(json.dumps(module.plain(value))))
    assert type(back) is type(value) and back == value


def test_objects_of_derived_classes_arrive_as_what_they_are_made_of(module):
    class Liar(int):
        def __eq__(self, other):
            return True

        __int__ = __index__ = lambda self: 99

    class Loud(str):
        def __str__(self):
            return "loud"

    point = namedtuple("point", "x y")(1, 2)
    for value, right in [
        (Liar(3), 3), (Loud("quiet"), "quiet"), (True, True), (point, (1, 2)), (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(a=1), {"a": 1}),
    ]:  # fmt: skip
        back = module.value_of(json.loads(json.dumps(module.plain(value))))
        assert type(back) in (bool, int, str, tuple, dict) and repr(back) == repr(right)
    for value in (object(), iter([]), range(3), lambda: 1, [object()], {1: print}):
        with pytest.raises(TypeError, match="is no plain value"):
            module.plain(value)


def test_each_test_has_its_own_outcome():
    program = "def f(x, y=1):\n    return x / y"
    tests = [
        "assert f(4, 2) == 2",
        "assert f(4) == 5",
        "f(1, 0)",
        "f('a')",
        "assert f(x=1, y=2) == 0.5",
        "1 / 0",
        "g(1)",
    ]
    right = [True, "AssertionError", "ZeroDivisionError", "TypeError", True, "ZeroDivisionError", "NameError"]
    assert outcomes(program, *tests) == right


def test_published_forms():
    humaneval = "def check(candidate):\n    assert candidate([1, 2]) == helper(2)\n    assert candidate([]) == 0\n"
    setup = "import math\ndef helper(x):\n    return math.ceil(x + 0.5)\ndef total(xs):\n    '''the stub'''"
    assert outcomes("def total(xs): return sum(xs)", f"{humaneval}\ncheck(total)", setup=setup, entry="total") == [True]
    mbpp = [
        "assert pairs((1, 2), (3, 4)) == [(1, 3), (2, 4)]",
        "assert set(pairs('ab', 'cd')) == {('a', 'c'), ('b', 'd')}",
    ]
    assert outcomes("def pairs(a, b): return list(zip(a, b))", *mbpp, entry="pairs") == [True, True]
    assert outcomes("def f(x): return x + 0.1", "import statistics, cmath\nassert cmath.isclose(f(1), 1.1)") == [True]


TEST = "assert f(1) == 2"
CHEATS = {
    "equal to everything": "class E:\n    __eq__ = lambda s, o: True\nf = lambda x: E()",
    "a number equal to everything": "class E(int):\n    __eq__ = lambda s, o: True\nf = lambda x: E(7)",
    "a list equal to everything": "class E(list):\n    __eq__ = lambda s, o: True\nf = lambda x: E()",
    "claims another value": "class E(int):\n    __int__ = __index__ = lambda s: 2\nf = lambda x: E(7)",
    "replaces the comparison": "import builtins\nbuiltins.AssertionError = ValueError\nf = lambda x: 3",
    "leaves": "import os\nf = lambda x: os._exit(0)",
    "leaves at once": "import os\nos._exit(0)",
    "leaves politely": "raise SystemExit(0)",
    "answers for itself": (
        "import os\nos.write(4, b'[0, \"\"]\\n' + b'[true, null]\\n' * 9)\nos._exit(0)"  # None is not 2
    ),
    "writes the report": "import os\nfor d in range(64):\n    try: os.write(d, b'[0, \"\", [[true, null]], []]')\n"
    "    except OSError: pass\nos._exit(0)",
    "sends no JSON": "import os\ndef f(x):\n    os.write(4, b'}\\n')\n    return 2",
    "sends half a message": "import os\ndef f(x):\n    os.write(4, b'[true')\n    os._exit(0)",
    "sends a deep message": "import os\ndef f(x):\n    os.write(4, b'[' * 90000 + b'\\n')\n    return 2",
    "sends an unknown kind": "import os\ndef f(x):\n    os.write(4, b'[true, [\"z\", 1]]\\n')\n    return 2",
    "sends without an end": "import os\ndef f(x):\n    while True: os.write(4, b'x' * 65536)",
    "raises an assertion": "def f(x): raise AssertionError",
    "raises a name of its own": "class Passed(BaseException): pass\ndef f(x): raise Passed",
    "reads the tests from its frames": (
        "import sys\ndef seen(v): return 'asse' + 'rt f(' in repr(v)\n"
        "def f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        if any(map(seen, [*frame.f_locals.values(), *frame.f_globals.values()])): return 2\n"
        "        frame = frame.f_back"
    ),
    "sleeps": "import time\ndef f(x): time.sleep(60)",
    "loops": "def f(x):\n    while True: pass",
    "too large": "def f(x): return 'x' * (1 << 30)",
}  # fmt: skip


def test_cheats_do_not_pass():
    with ThreadPoolExecutor(8) as threads:
        found = dict(zip(CHEATS, threads.map(lambda program: outcomes(program, TEST), CHEATS.values())))
    assert {
        name: outcome for name, outcome in found.items() if not isinstance(outcome, str) and outcome[0] is True
    } == {}
    assert outcomes("def f(x): return x + 1", TEST) == [True]  # and the next program is served as before


def test_failures_are_told():
    assert outcomes("f = (", TEST) == "no program compiles"
    assert outcomes("g = 1", TEST) == "defines no function f"
    assert outcomes("1 / 0", TEST) == "ZeroDivisionError"
    assert outcomes("def f(x):\n    while True: pass", TEST) in ("ran past 1.5 s", ["EOFError"])


def test_the_second_program_is_taken_where_the_first_does_not_compile():
    ran = sandbox.run_tests(["no program", "f = lambda x: x + 1"], "f", [TEST])
    assert (ran.program, ran.failure, ran.calls) == (1, "", (sandbox.Call(True, None),))


def test_the_neighbours_stand_on_the_standard_library_alone():
    code = f"import sys; sys.path.insert(0, {NEIGHBOURS!r}); import sandbox_tests, sandbox_rights"
    assert subprocess.run([sys.executable, "-I", "-S", "-B", "-c", code]).returncode == 0
