"""Hostile programs: each tries one thing and answers right only if it got away with it; none gets more than a 1."""

import functools
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rubric import sandbox, verify

META = {"entry": "f", "tests": [{"args": [1], "expect": 2}, {"args": [2], "expect": 3}]}
impatient = functools.partial(sandbox.run, cpu_s=1, wall_s=1.2)


def tried(act: str, setup: str = "") -> str:
    """Right only where `act` raises nothing."""
    body = "\n".join("    " + line for line in act.split("\n"))
    return f"{setup}\ndef f(x):\n{body}\n    return x + 1"


LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)"


def native(call: str) -> str:
    """Right where a function of the C library does not fail."""
    return tried(f"if {call} == -1: raise OSError(ctypes.get_errno())", LIBC)


ENDLESS = {
    "endless loop": "while True:\n    pass",
    "endless loop in the call": tried("while True: pass"),
    "endless loop that catches everything": "while True:\n    try:\n        f = 1 / 0\n    except BaseException: pass",
    "regular expression that backtracks": tried("re.match('(a+)+$', 'a' * 64 + 'b')", "import re"),
    "long sum": tried("sum(range(10 ** 12))"),
    "large power": tried("len(str(9 ** 9 ** 9))"),
    "comparison that never ends": tried("E() + 1", "class E(int):\n    def __add__(s, o):\n        while True: pass"),
    "decimal of many digits": tried("decimal.getcontext().prec = 10 ** 9\ndecimal.Decimal(2).sqrt()", "import decimal"),
    "sleeps": "import time\ntime.sleep(3600)",
    "sleeps in pieces": tried("while True:\n    try: time.sleep(0.01)\n    except BaseException: pass", "import time"),
    "waits for a lock": tried("lock = threading.Lock()\nlock.acquire()\nlock.acquire()", "import threading"),
    "waits for input of its pipe": tried("select.select([3], [], [])", "import select"),
    "tracing function that never returns": tried(
        "pass", "import sys\ndef t(*a):\n    while True: pass\nsys.settrace(t)"
    ),
    "finaliser that never ends": tried("D()", "class D:\n    def __del__(s):\n        while True: pass"),
}
LARGE = {
    "memory bomb": tried("[bytearray(1 << 28) for _ in range(64)]"),
    "much memory at once": tried("bytearray(700 << 20)"),
    "memory bomb in steps": "bomb = ['a']\nwhile True:\n    bomb = bomb + bomb",
    "memory of the C library": tried("[ctypes.create_string_buffer(1 << 28) for _ in range(64)]", "import ctypes"),
    "mapped memory": tried("mmap.mmap(-1, 1 << 31)", "import mmap"),
    "long string": tried("'a' * 10 ** 11"),
    "recursion": tried("f(x)"),
    "recursion without a limit": tried("f(x)", "import sys\nsys.setrecursionlimit(10 ** 9)"),
    "deep source": "f = " + "(" * 100_000,
    "long source": "f = lambda x: " + "+".join(["x"] * 100_000),
    "huge result": "def f(x):\n    return 'x' * (1 << 22)",
    "deep result": "def f(x):\n    a = []\n    for _ in range(100000): a = [a]\n    return a",
    "result that holds itself": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "huge output": "def f(x):\n    print('x' * (1 << 24))\nprint('x' * (1 << 24))\nf(1)\nraise ValueError",
    "huge report": "import os\nwhile True: os.write(3, b'x' * 65536)",
}
EXITS = {
    "os._exit": tried("os._exit(0)", "import os"),
    "sys.exit": "import sys\ndef f(x):\n    return x + 1\nsys.exit(0)",
    "sys.exit in the call": tried("sys.exit(0)", "import sys"),
    "raises SystemExit": tried("raise SystemExit(0)"),
    "raises KeyboardInterrupt": tried("raise KeyboardInterrupt"),
    "abort": tried("os.abort()", "import os"),
    "segmentation fault": tried("ctypes.string_at(0)", "import ctypes"),
    "overwrites memory": tried("ctypes.memset(id(None), 0, 4096)", "import ctypes"),
    "kills itself": tried("os.kill(os.getpid(), signal.SIGKILL)", "import os, signal"),
    "stops itself": tried("os.kill(os.getpid(), signal.SIGSTOP)", "import os, signal"),
    "closes every descriptor": tried("os.closerange(0, 64)", "import os"),
}
FILES = {
    "reads /etc/passwd": tried("open('/etc/passwd').read()"),
    "reads /etc/passwd by descriptor": tried("os.open('/etc/passwd', os.O_RDONLY)", "import os"),
    "reads /etc/passwd with io": tried("io.FileIO('/etc/passwd').read()", "import io"),
    "reads /etc/passwd with pathlib": tried("pathlib.Path('/etc/passwd').read_text()", "import pathlib"),
    "reads /etc/passwd natively": tried("if not libc.fopen(b'/etc/passwd', b'r'): raise OSError", LIBC),
    "reads /etc/passwd as source": tried("assert linecache.getlines('/etc/passwd')", "import linecache"),
    "reads its own source": tried("open(__import__('__main__').__file__).read()"),
    "reads the tests": tried(f"open({__file__!r}).read()"),
    "reads the trainer's environment": tried("open(f'/proc/{os.getppid()}/environ').read()", "import os"),
    "reads its own environment": tried("open('/proc/self/environ').read()"),
    "reads its own memory": tried("open('/proc/self/mem', 'rb').read(1)"),
    "reads its own maps": tried("open('/proc/self/maps').read()"),
    "lists processes": tried("os.listdir('/proc')", "import os"),
    "lists the root": tried("list(os.scandir('/'))", "import os"),
    "a secret of the environment": tried("os.environ['SECRET_TOKEN']", "import os"),
    "writes a file": tried("open('a', 'w').write('x')"),
    "writes a file natively": native("libc.creat(b'/tmp/rubric-hostile', 0o600)"),
    "writes to the temporary folder": tried("tempfile.TemporaryFile().write(b'x')", "import tempfile"),
    "writes into the standard library": tried("open(os.__file__, 'a').write('x')", "import os"),
    "writes into site-packages": tried("open(os.__file__[:-5] + 'site-packages/evil.pth', 'w')", "import os"),
    "truncates": tried(f"os.truncate({__file__!r}, 0)", "import os"),
    "removes": tried(f"os.remove({__file__!r})", "import os"),
    "renames": tried(f"os.rename({__file__!r}, '/tmp/rubric-hostile')", "import os"),
    "makes a folder": tried("os.mkdir('/tmp/rubric-hostile')", "import os"),
    "links out of its folder": tried("os.symlink('/etc/passwd', 'a')\nopen('a').read()", "import os"),
    "changes rights": tried("os.chmod('/tmp', 0o777)", "import os"),
    "file in memory": tried("os.memfd_create('a')", "import os"),
    "shared memory": tried(
        "shared_memory.SharedMemory(create=True, size=4096)", "from multiprocessing import shared_memory"
    ),
    "database": tried("sqlite3.connect('/tmp/rubric-hostile')", "import sqlite3"),
    "imports from elsewhere": tried("import rubric", f"import sys\nsys.path.insert(0, {os.getcwd()!r})"),
    "import hook": tried(
        "import evil", "import sys, importlib.util as u\nclass H:\n    @staticmethod\n    def find_spec(n, *a):\n"
        f"        return u.spec_from_file_location(n, {__file__!r})\nsys.meta_path.insert(0, H)"
    ),
}  # fmt: skip
OUTSIDE = {
    "socket": tried("socket.socket()", "import socket"),
    "socket pair": tried("socket.socketpair()", "import socket"),
    "connects": tried("socket.create_connection(('127.0.0.1', 1), 1)", "import socket"),
    "looks up a name": tried("socket.gethostbyname('example.com')", "import socket"),
    "fetches": tried("urllib.request.urlopen('http://127.0.0.1:1')", "import urllib.request"),
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "forks": tried("os.fork() or os._exit(0)", "import os"),
    "forks natively": native("libc.fork()"),
    "a child that outlives it": tried("if os.fork() == 0: time.sleep(3600)", "import os, time"),
    "thread": tried("threading.Thread(target=print).start()", "import threading"),
    "thread bomb": tried("for _ in range(1000): _thread.start_new_thread(print, ())", "import _thread"),
    "starts a program": tried("subprocess.run(['true'], check=True)", "import subprocess"),
    "shell": tried("assert os.system('true') == 0", "import os"),
    "shell natively": tried("assert libc.system(b'true') == 0", LIBC),
    "spawns": tried("os.posix_spawn('/bin/true', ['true'], {})", "import os"),
    "becomes another program": tried("os.execv('/bin/true', ['true'])", "import os"),
    "pool of processes": tried("multiprocessing.Pool(2).map(abs, [1])", "import multiprocessing"),
    "kills its parent": tried("os.kill(os.getppid(), 9)", "import os"),
    "kills its group": tried("os.killpg(0, 9)", "import os"),
    "kills the trainer": tried(f"os.kill({os.getpid()}, 9)", "import os"),
    "kills the trainer natively": native(f"libc.kill({os.getpid()}, 9)"),
    "debugs the trainer": native(f"libc.ptrace(16, {os.getpid()}, 0, 0)"),
    "signal handler": tried("signal.signal(signal.SIGTERM, signal.SIG_IGN)", "import signal"),
    "blocks signals": tried("signal.pthread_sigmask(0, range(1, 64))", "import signal"),
    "stops the alarm": tried("signal.setitimer(signal.ITIMER_REAL, 0)", "import signal"),
    "raises its limits": tried("resource.setrlimit(resource.RLIMIT_CPU, (99, 99))", "import resource"),
    "lowers the trainer's limits": tried(f"resource.prlimit({os.getpid()}, 0, (1, 1))", "import resource"),
    "becomes root": native("libc.setuid(0)"),
    "leaves its namespaces": native("libc.unshare(0x10000000)"),
    "takes back its filter": native("libc.prctl(22, 0, 0)"),
    "mounts": native("libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)"),
    "reads its input": tried("input()"),
    "pickle that runs a command": tried(
        "assert pickle.loads(b'cos\\nsystem\\n(S\"exit 1\"\\ntR.') == 256", "import pickle"
    ),
}
FORGED = {
    "prints a result": "print('[0, \"\", [[true, 2], [true, 3]], []]')",
    "writes to every descriptor": (
        "import os\nfor fd in range(32):\n    try: os.write(fd, b'[0, \"\", [[true, 2], [true, 3]], []]')\n"
        "    except OSError: pass\nos._exit(0)"
    ),
    "replaces json": "import json\njson.dumps = lambda *a, **k: '[true, 2]'\nf = 3",
    "replaces builtins": "import builtins\nbuiltins.callable = lambda x: True\nf = None",
    "replaces the exit": "import os\nos._exit = os.write = print\nf = None",
    "replaces the report": "import __main__\n__main__.report = lambda *a: ('', ['[true, 2]', '[true, 3]'])\nf = None",
    "takes away the builtins": "__builtins__.clear() if isinstance(__builtins__, dict) else vars(__builtins__).clear()",
    "equal to everything": "class E:\n    __eq__ = lambda s, o: True\nf = lambda x: E()",
    "a result that runs code": "class E:\n    __reduce__ = lambda s: (print, ())\nf = lambda x: E()",
    "a result that is endless": "import itertools\nf = lambda x: itertools.count()",
    "answers with the test": "def f(x):\n    import sys\n    return sys._getframe(1).f_locals['tests'][0]['expect']",
    "no program": "I am sorry, I cannot do that.",
    "null byte": "f = 1\0",
    "lone surrogate": "f = '\udc80'",
    "empty": "",
}
GROUPS = {"large": LARGE, "exits": EXITS, "files": FILES, "outside": OUTSIDE, "forged": FORGED}
HOSTILE = ENDLESS | LARGE | EXITS | FILES | OUTSIDE | FORGED


def grades(programs: dict[str, str]) -> dict[str, tuple[int, float]]:
    """(grade, seconds) of each program, eight at a time."""

    def timed(program: str) -> tuple[int, float]:
        start = time.monotonic()
        return verify.python_tests(program, None, META), time.monotonic() - start

    with ThreadPoolExecutor(8) as threads:
        return dict(zip(programs, threads.map(timed, programs.values())))


def children_of_keepers() -> list[str]:
    """Processes that were forked by a keeper of this process and still live."""
    if not os.path.isdir("/proc"):
        return []
    parents = {}
    for folder in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{folder}/stat") as stat:
                parents[int(folder)] = int(stat.read().rpartition(")")[2].split()[1])
        except OSError:
            continue  # ended since
    keepers = {keeper.process.pid for keeper in sandbox._keepers._idle}
    return [process for process, parent in parents.items() if parent in keepers]


@pytest.fixture
def guarded(monkeypatch):
    """Short limits, a secret in the environment, and afterwards nothing that is left over or damaged."""
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    monkeypatch.setattr(sandbox, "run", impatient)
    with open(__file__, "rb") as file:
        before = file.read()
    yield
    with open(__file__, "rb") as file:
        assert file.read() == before
    assert children_of_keepers() == []
    assert not os.path.exists("/tmp/rubric-hostile")
    assert verify.python_tests("def f(x): return x + 1", None, META) == 4  # the next program is served as before


def assert_lowest(found: dict[str, tuple[int, float]]) -> None:
    assert {name: grade for name, (grade, _) in found.items() if grade != 1} == {}
    assert {name: seconds for name, (_, seconds) in found.items() if seconds > 8.0} == {}


def test_there_are_many_of_them_and_the_acts_that_must_fail_are_right_when_they_do_not():
    assert len(HOSTILE) >= 100
    assert verify.python_tests(tried("pass", "import os"), None, META) == 4
    assert verify.python_tests(native("libc.getpid()"), None, META) in (1, 4)  # 1 without seccomp: no native code


def test_programs_that_do_not_end(guarded):
    assert_lowest(grades(ENDLESS))


@pytest.mark.parametrize("group", GROUPS)
def test_hostile_programs(guarded, group):
    assert_lowest(grades(GROUPS[group]))


def test_a_program_that_finds_the_pipe_and_the_word_learns_no_expected_value():
    forger = (
        "import sys, os\n"
        "frame = sys._getframe()\n"
        "while frame.f_code.co_name != 'program_alone': frame = frame.f_back\n"
        "request = frame.f_locals['request']\n"
        "assert request['calls'] == [[1], [2]] and 'tests' not in request\n"
        "os.write(3, (request['word'] + '[0, \"\", [[true, 0], [true, 0]], []]').encode())\n"
        "os._exit(0)\n"
    )
    ran = sandbox.run([forger], "f", [[1], [2]])
    assert [call.value for call in ran.calls] == [0, 0]  # the forgery arrives,
    assert verify.python_tests(forger, None, META) == 2  # and is worth what `def f(x): return 0` is worth
    assert verify.python_tests("def f(x): return 0", None, META) == 2


@pytest.mark.parametrize(
    "value",
    ["type('I', (int,), {'__eq__': lambda s, o: True})(0)", "type('S', (str,), {'__eq__': lambda s, o: True})()"],
)
def test_a_value_that_claims_to_be_equal_is_worth_what_it_is(value):
    assert verify.python_tests(f"f = lambda x: {value}", None, META) == 2


@pytest.fixture
def unfiltered(monkeypatch):
    """Keepers as on a machine without libseccomp."""
    keepers = sandbox._Keepers()
    monkeypatch.setattr(sandbox, "_keepers", keepers)
    monkeypatch.setattr(sandbox, "call_filter", lambda: b"")
    yield
    keepers.close()


def test_without_a_filter_the_audit_hook_refuses_the_same(unfiltered, guarded):
    assert "audit hook" in sandbox.in_force() and "pip install pyseccomp" in sandbox.in_force()
    programs = FILES | FORGED | EXITS | OUTSIDE
    del programs["file in memory"]  # which the limit of written bytes keeps empty
    assert_lowest(grades(programs))
