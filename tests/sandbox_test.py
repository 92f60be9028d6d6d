"""The sandbox: what comes back from a program, and what is in force while it runs."""

import errno
import json
import math
import os
import signal
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rubric import sandbox


def test_values_come_back_in_order_and_errors_stay_with_their_call():
    program = "import math\ndef f(x):\n    print('noise')\n    return {'root': (math.sqrt(x), x)}"
    ran = sandbox.run(["this is no program", program], "f", [[4], [-1], [9]])
    assert ran.program == 1 and ran.failure == ""
    assert [call.returned for call in ran.calls] == [True, False, True]
    assert ran.calls[0].value == {"root": [2.0, 4]}
    assert ran.calls[1].value == "ValueError"


def test_the_reason_of_a_failure_is_told():
    cases = {
        "": "defines no function f",
        "def f(:": "no program compiles",
        "1 / 0": "ZeroDivisionError",
        "import os; os._exit(0)": "ended before its result",
        "import time; time.sleep(60)": "ran past 0.5 s",
        "f = lambda: 'x' * (1 << 21)": "returned over 1048576 bytes",
    }
    for program, reason in cases.items():
        wall_s = 0.5 if "sleep" in program else 10.0
        ran = sandbox.run([program], "f", [[]], cpu_s=1, wall_s=wall_s)
        assert (ran.failure, ran.calls) == (reason, ()), program


def test_a_later_call_cannot_change_what_an_earlier_one_returned():
    program = "seen = []\ndef f(x):\n    seen.append(x)\n    return seen"
    assert [call.value for call in sandbox.run([program], "f", [[1], [2]]).calls] == [[1], [1, 2]]


def test_the_child_inherits_nothing(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    program = (
        "import os\n"
        "def f():\n"
        "    open_ones = []\n"
        "    for descriptor in range(64):\n"
        "        try: os.read(descriptor, 0) if descriptor != 3 else os.write(3, b'')\n"
        "        except OSError: continue\n"
        "        open_ones.append(descriptor)\n"
        "    return [sorted(os.environ), open_ones, os.getuid()]\n"
    )
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    (call,) = sandbox.run([program], "f", [[]]).calls
    os.close(read_end), os.close(write_end)
    names, descriptors, user = call.value
    assert set(names) <= {"LC_CTYPE"}  # Python's own, for the C locale
    assert descriptors == [0, 1, 2, 3]  # three to nowhere and the pipe
    assert user != os.getuid() or os.getuid() != 0


@pytest.mark.parametrize(
    "line, value",
    [
        ("import sys, typing, dataclasses, decimal, ctypes, collections.abc; v = 1", 1),
        ("from statistics import median as m; v = m([1, 2, 9])", 2),
        ("import xml.etree.ElementTree as E; v = E.fromstring('<a b=\"1\"/>').attrib['b']", "1"),  # not preloaded
        ("import datetime; v = datetime.datetime.strptime('2024', '%Y').year", 2024),  # imports _strptime late
        ("import time; v = len(time.strftime('%Z', time.localtime())) > 0", True),
        ("import random; random.seed(1); v = random.randint(1, 1) + len(random.sample(range(9), 3))", 4),
        ("import hashlib; v = hashlib.sha256(b'').hexdigest()[:4]", "e3b0"),
        ("import time; time.sleep(0.01); v = time.time() > 0", True),
        ("v = [c.encode('utf-16').hex()[4:] for c in 'a']", ["6100"]),
        ("import os; v = os.path.join('a', 'b') + os.sep", "a/b/"),
        ("import uuid; v = len(str(uuid.uuid4()))", 36),
        ("print('x'); import sys; sys.stderr.write('y'); v = input.__name__", "input"),
    ],
)
def test_honest_programs_find_what_they_need(line, value):
    assert sandbox.run([f"{line}\ndef f(): return v"], "f", [[]]) == sandbox.Ran(0, (sandbox.Call(True, value),), "")


def test_modules_with_a_side_effect_or_from_elsewhere_are_not_imported():
    for name in ("antigravity", "numpy", "rubric"):
        assert sandbox.run([f"import {name}\nf = len"], "f", [[[]]]).failure in (
            "ModuleNotFoundError",
            "PermissionError",
        )


def test_programs_do_not_see_one_another():
    spoil = "import json, math\nmath.pi = 3\njson.dumps = None\ndef f(): return math.pi"
    sandbox.run([spoil], "f", [[]])
    assert sandbox.run(["import math\ndef f(): return math.pi"], "f", [[]]).calls[0].value == math.pi


def test_threads_run_programs_at_the_same_time():
    with ThreadPoolExecutor(6) as threads:
        rans = [*threads.map(lambda n: sandbox.run([f"def f(x): return x * {n}"], "f", [[7]]), range(40))]
    assert [ran.calls[0].value for ran in rans] == [7 * n for n in range(40)]


def test_a_keeper_that_was_killed_is_replaced():
    program = ["def f(x): return x + 1"]
    assert sandbox.run(program, "f", [[1]]).calls[0].value == 2
    for keeper in sandbox._keepers._idle:
        os.kill(keeper.process.pid, signal.SIGKILL)
    assert sandbox.run(program, "f", [[1]]).calls[0].value == 2


def test_a_program_ends_with_its_keeper():
    keeper = sandbox._Keeper(sandbox.call_filter())
    request = {"programs": ["import time; time.sleep(60)"], "entry": "f", "calls": [], "word": "w"}
    request |= {"cpu_s": 1, "memory_bytes": sandbox.MEMORY_BYTES}
    keeper._send([json.dumps(request).encode()], 60.0)
    time.sleep(0.3)
    try:
        with open(f"/proc/{keeper.process.pid}/task/{keeper.process.pid}/children") as file:
            (child,) = file.read().split()
    except FileNotFoundError:
        pytest.skip("the kernel does not list children")
    finally:
        keeper.stop()
    time.sleep(0.2)
    try:
        with open(f"/proc/{child}/stat") as file:
            state = file.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        state = "gone"
    assert state in ("gone", "Z")  # Z: dead, and nobody has asked for its status


def test_what_is_in_force_is_said_in_one_line():
    line = sandbox.in_force()
    assert line.startswith("sandbox: ") and "\n" not in line
    assert ("seccomp" in line) != ("audit hook" in line)
    assert "2 s of processor, 4 s in all, 512 MiB" in line


def test_the_filter_knows_three_answers():
    pytest.importorskip("pyseccomp")
    program = sandbox.call_filter()
    assert len(program) % 8 == 0
    instructions = [struct.unpack("HBBI", program[at : at + 8]) for at in range(0, len(program), 8)]
    returned = {value for code, _, _, value in instructions if code == 0x06}  # BPF_RET | BPF_K
    assert returned <= {0x7FFF0000, 0x00050000 | errno.EPERM, 0x00000000, 0x80000000}  # allow, EPERM, kill


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_as_root_the_child_owns_nothing_even_without_a_filter(tmp_path, monkeypatch):
    secret = tmp_path / "checkpoint"
    secret.write_text("weights")
    secret.chmod(0o600)
    keepers = sandbox._Keepers()
    monkeypatch.setattr(sandbox, "_keepers", keepers)
    monkeypatch.setattr(sandbox, "call_filter", lambda: b"")
    program = (
        "import posix\n"  # below the names that the audit hook could have replaced
        f"def f(act):\n    return getattr(posix, act)({str(secret)!r}) if act else posix.kill({os.getpid()}, 0)"
    )
    ran = sandbox.run([program], "f", [["remove"], ["listdir"], [""]])
    keepers.close()
    assert [call.value for call in ran.calls] == ["PermissionError"] * 3
    assert secret.read_text() == "weights"
