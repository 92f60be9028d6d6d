"""The sandbox: what comes back, and that a hostile program harms nobody and outlives no limit."""

import functools
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rubric import sandbox, verify

ENDLESS = "while True:\n    pass"
HOSTILE = {
    "endless loop": ENDLESS,
    "endless loop in the call": f"def f(x):\n    {ENDLESS.replace(chr(10), chr(10) + '    ')}",
    "endless loop that catches everything": "while True:\n    try:\n        f = 1 / 0\n    except BaseException: pass",
    "sleeps": "import time\ntime.sleep(3600)",
    "sleeps without an alarm": "import signal, time\nsignal.setitimer(signal.ITIMER_REAL, 0)\ntime.sleep(3600)",
    "memory bomb": "bomb = [bytearray(1 << 28) for _ in range(64)]\ndef f(x):\n    return x + 1",
    "much memory at once": "much = bytearray(700 << 20)\ndef f(x):\n    return x + 1",
    "memory bomb in steps": "bomb = ['a']\nwhile True:\n    bomb = bomb + bomb",
    "large power": "def f(x):\n    return len(str(9 ** 9 ** 9))",
    "os._exit": "import os\ndef f(x):\n    os._exit(0)",
    "sys.exit": "import sys\ndef f(x):\n    return x + 1\nsys.exit(0)",
    "sys.exit in the call": "import sys\ndef f(x):\n    sys.exit(0)",
    "kills itself": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "thread bomb": "import threading\ndef f(x):\n    for _ in range(10): threading.Thread(target=print).start()",
    "starts a program": "import subprocess\ndef f(x):\n    return subprocess.run(['sleep', '3600'])",
    "huge output": "def f(x):\n    print('x' * (1 << 24))\nprint('x' * (1 << 24))\nf(1)\nraise ValueError",
    "huge result": "def f(x):\n    return 'x' * (1 << 22)",
    "deep result": "def f(x):\n    a = []\n    for _ in range(100000): a = [a]\n    return a",
    "recursion": "def f(x):\n    return f(x)",
    "deep source": "f = " + "(" * 100_000,
    "reads the environment": "import os\ndef f(x):\n    return os.environ['HOME']",
    "writes a file": "def f(x):\n    with open('a', 'w') as a: a.write('x')\n    return x + 1",
    "reads its input": "def f(x):\n    return input()",
    "prints a result": "print('[0, \"\", [[true, 2], [true, 3]]]')",
    "writes to every descriptor": (
        "import os\nfor fd in range(32):\n    try: os.write(fd, b'[0, \"\", [[true, 2], [true, 3]]]')\n"
        "    except OSError: pass\nos._exit(0)"
    ),
    "replaces json": "import json\njson.dumps = lambda *a, **k: '[true, 2]'\nf = 3",
    "replaces builtins": "import builtins\nbuiltins.callable = lambda x: True\nf = None",
    "no program": "I am sorry, I cannot do that.",
    "null byte": "f = 1\0",
    "lone surrogate": "f = '\udc80'",
}
META = {"entry": "f", "tests": [{"args": [1], "expect": 2}, {"args": [2], "expect": 3}]}
impatient = functools.partial(sandbox.run, cpu_s=1, wall_s=1.5)


def python_children() -> list[str]:
    """Command lines of living sandbox children of this process."""
    found = []
    for folder in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        try:
            with open(f"/proc/{folder}/stat") as stat, open(f"/proc/{folder}/cmdline") as line:
                parent, command = int(stat.read().rpartition(")")[2].split()[1]), line.read()
        except OSError:
            continue  # ended since
        if "sandbox_child.py" in command and parent == os.getpid():
            found.append(command)
    return found


def test_hostile_programs_end_soon_and_get_the_lowest_grade(monkeypatch):
    monkeypatch.setattr(sandbox, "run", impatient)

    def timed(program: str) -> tuple[int, float]:
        start = time.monotonic()
        return verify.python_tests(program, None, META), time.monotonic() - start

    with ThreadPoolExecutor(8) as threads:
        outcomes = dict(zip(HOSTILE, threads.map(timed, HOSTILE.values())))
    assert {name: grade for name, (grade, _) in outcomes.items() if grade != 1} == {}
    assert {name: seconds for name, (_, seconds) in outcomes.items() if seconds > 6.0} == {}
    assert python_children() == []


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


def test_a_program_that_finds_the_pipe_and_the_word_learns_no_expected_value():
    forger = (
        "import sys, os\n"
        "frame = sys._getframe()\n"
        "while frame.f_code.co_name != 'main': frame = frame.f_back\n"
        "known = frame.f_locals\n"
        "answer = known['request']['word'] + '[0, \"\", [[true, 0], [true, 0]]]'\n"
        "assert known['request']['calls'] == [[1], [2]] and 'tests' not in known['request']\n"
        "os.write(known['pipe'], answer.encode())\n"
        "os._exit(0)\n"
    )
    ran = sandbox.run([forger], "f", [[1], [2]])
    assert [call.value for call in ran.calls] == [0, 0]  # the forgery arrives,
    assert verify.python_tests(forger, None, META) == 2  # and is worth what `def f(x): return 0` is worth


def test_the_child_inherits_nothing(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    program = (
        "import os, typing, dataclasses, decimal, ctypes\n"  # the standard library is there
        "def f():\n"
        "    return [sorted(os.environ), os.getcwd(), os.listdir('.'), os.listdir('/proc/self/fd'), os.getuid()]\n"
    )
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    (call,) = sandbox.run([program], "f", [[]]).calls
    os.close(read_end), os.close(write_end)
    names, folder, files, descriptors, user = call.value
    assert set(names) <= {"LC_CTYPE"}  # Python's own, for the C locale
    assert not os.path.exists(folder) and files == []
    assert len(descriptors) <= 7  # three to nowhere, the pipe, two of the sandbox, and the listing's own
    assert user != os.getuid() or os.getuid() != 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_as_root_the_child_owns_nothing(tmp_path):
    secret = tmp_path / "checkpoint"
    secret.write_text("weights")
    secret.chmod(0o600)
    program = (
        f"import os\ndef f(act):\n    return getattr(os, act)({str(secret)!r}) if act else os.kill({os.getpid()}, 0)"
    )
    ran = sandbox.run([program], "f", [["remove"], ["listdir"], [""]])
    assert [call.value for call in ran.calls] == ["PermissionError"] * 3
    assert secret.read_text() == "weights"
