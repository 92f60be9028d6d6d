"""All processes end when one does: plain interpreters on loopback, without JAX."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # processes wait for each other for seconds
ROOT = Path(__file__).resolve().parent.parent
HOST = socket.gethostname()

CHILD = """
import json, os, sys, time
from pathlib import Path
from sharding.lifeline import Lifeline

folder, process, processes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def gather(value):
    (folder / f"{process}.part").write_text(json.dumps(value))
    os.rename(folder / f"{process}.part", folder / f"{process}.json")
    files = [folder / f"{each}.json" for each in range(processes)]
    while not all(file.exists() for file in files):
        time.sleep(0.01)
    return [json.loads(file.read_text()) for file in files]

lifeline = Lifeline.join(process, gather)
lifeline.advice = "continue with: resume"
(folder / f"{process}.joined").touch()
"""


def start(folder: Path, action: str, processes: int = 3) -> list[subprocess.Popen]:
    """Processes that are connected and then do `action`, Python."""
    command = [sys.executable, "-c", CHILD + action, str(folder)]
    started = [
        subprocess.Popen([*command, str(p), str(processes)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for p in range(processes)
    ]
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.joined"))) < processes:
        assert time.monotonic() < deadline and all(process.poll() in (None, 0) for process in started)
        time.sleep(0.02)
    return started


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit code and error output of each."""
    return [(process.returncode, err) for process in processes for _, err in [process.communicate(timeout=60)]]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_named_by_all_others(tmp_path, victim):
    processes = start(tmp_path, "time.sleep(60)")
    processes[victim].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    found = ended(processes)
    assert time.monotonic() - begun < 30
    line = f"error: process {victim} of 3 (on {HOST}) is gone; continue with: resume\n"
    assert found == [(-9, "") if p == victim else (1, line) for p in range(3)]


@pytest.mark.parametrize("who", ["process == 1", "process == 0", "True"])
def test_what_ends_one_ends_all_with_its_code_and_is_said_once(tmp_path, who):
    action = f"if {who}: lifeline.end(2, 'no such key', everywhere=False)\ntime.sleep(60)"
    found = ended(start_until_over(tmp_path, action))
    assert [code for code, _ in found] == [2, 2, 2]
    assert [err for _, err in found] == ["error: no such key; continue with: resume\n", "", ""]


def start_until_over(folder: Path, action: str) -> list[subprocess.Popen]:
    """As start, for what may be over before all are seen to have joined."""
    command = [sys.executable, "-c", CHILD + action, str(folder)]
    return [subprocess.Popen([*command, str(p), "3"], cwd=ROOT, stderr=subprocess.PIPE, text=True) for p in range(3)]


def test_what_everybody_should_read_is_said_by_all(tmp_path):
    found = ended(start_until_over(tmp_path, "if process == 2: lifeline.end(1, 'disk full', True)\ntime.sleep(60)"))
    assert found == [(1, "error: disk full; continue with: resume\n")] * 3


def test_those_who_leave_are_not_missed(tmp_path):
    found = ended(start(tmp_path, "lifeline.leave()\ntime.sleep(0.3 * (3 - process))"))
    assert found == [(0, "")] * 3


def test_an_abort_becomes_a_line_and_exit_code_1(tmp_path):
    found = ended(start_until_over(tmp_path, "if process == 1: os.abort()\ntime.sleep(60)"))
    assert [code for code, _ in found] == [1, 1, 1]
    assert found[1][1].startswith("error: process 1: JAX gave up") and found[1][1].count("\n") == 1
    assert found[0][1] == found[2][1] == f"error: process 1 of 3 (on {HOST}) is gone; continue with: resume\n"


def test_whoever_else_knocks_is_turned_away(tmp_path):
    waiting = "while not (folder / 'go').exists(): time.sleep(0.02)\nlifeline.leave()"
    processes = start(tmp_path, waiting)
    port = json.loads((tmp_path / "0.json").read_text())["port"]
    for hello in (b"GET / HTTP/1.1\r\n\r\n", b'{"token": "guess", "process": 1}\n', b"[1]\n"):
        with socket.create_connection(("127.0.0.1", port), 10) as stranger:
            stranger.sendall(hello)
            stranger.settimeout(10)
            assert stranger.recv(10) == b""
    (tmp_path / "go").touch()
    assert ended(processes) == [(0, "")] * 3
