"""All processes end when one does: plain interpreters on loopback, without JAX."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOST = socket.gethostname()

CHILD = """
import json, os, sys, time
from pathlib import Path
from sharding.lifeline import Lifeline

folder, process, processes = Path(sys.argv[1]), int(sys.argv[2]), 3

def gather(value):
    (folder / f"{process}.part").write_text(json.dumps(value))
    os.rename(folder / f"{process}.part", folder / f"{process}.json")
    wait_for("json")
    return [json.loads((folder / f"{each}.json").read_text()) for each in range(processes)]

def wait_for(kind):
    while not all((folder / f"{each}.{kind}").exists() for each in range(processes)):
        time.sleep(0.01)
"""
JOIN = """
lifeline = Lifeline.join(process, gather)
lifeline.advice = "continue with: resume"
(folder / f"{process}.joined").touch()
"""
JOINED = CHILD + JOIN + 'wait_for("joined")\n'  # all have connected and say the same


def start(folder: Path, code: str) -> list[subprocess.Popen]:
    """Three processes that run `code`, Python."""
    command = [sys.executable, "-c", code, str(folder)]
    return [subprocess.Popen([*command, str(p)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for p in range(3)]


def start_joined(folder: Path, action: str) -> list[subprocess.Popen]:
    """As start, returning when all have joined; no `action` ends one before."""
    started = start(folder, JOINED + action)
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.joined"))) < len(started):
        assert time.monotonic() < deadline and all(process.poll() in (None, 0) for process in started)
        time.sleep(0.02)
    return started


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit code and error output of each."""
    try:
        return [(process.returncode, err) for process in processes for _, err in [process.communicate(timeout=50)]]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_named_by_all_others(tmp_path, victim):
    processes = start_joined(tmp_path, "time.sleep(60)")
    processes[victim].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    found = ended(processes)
    assert time.monotonic() - begun < 30
    line = f"error: process {victim} of 3 (on {HOST}) is gone; continue with: resume\n"
    assert found == [(-9, "") if p == victim else (1, line) for p in range(3)]


@pytest.mark.parametrize("who", ["process == 1", "process == 0", "True"])
def test_what_ends_one_ends_all_with_its_code_and_is_said_once(tmp_path, who):
    action = f"if {who}: lifeline.end(2, 'no such key', everywhere=False)\ntime.sleep(60)"
    found = ended(start(tmp_path, JOINED + action))
    assert [code for code, _ in found] == [2, 2, 2]
    assert [err for _, err in found] == ["error: no such key; continue with: resume\n", "", ""]


@pytest.mark.parametrize("who", [0, 1])
def test_an_end_reaches_those_who_are_still_connecting(tmp_path, who):
    late = "own = gather\ndef gather(value):\n    found = own(value)\n    time.sleep(process)\n    return found\n"
    action = f"if process == {who}: lifeline.end(2, 'no such key', everywhere=False)\ntime.sleep(60)"
    begun = time.monotonic()
    found = ended(start(tmp_path, CHILD + late + JOIN + action))
    assert time.monotonic() - begun < 30
    assert [code for code, _ in found] == [2, 2, 2]
    said = "".join(err for _, err in found)
    assert said.startswith("error: no such key") and said.count("\n") == 1


def test_what_everybody_should_read_is_said_by_all(tmp_path):
    action = "if process == 2: lifeline.end(1, 'disk full', True)\ntime.sleep(60)"
    found = ended(start(tmp_path, JOINED + action))
    assert found == [(1, "error: disk full; continue with: resume\n")] * 3


def test_those_who_leave_are_not_missed(tmp_path):
    found = ended(start_joined(tmp_path, "lifeline.leave()\ntime.sleep(0.3 * (3 - process))"))
    assert found == [(0, "")] * 3


def test_an_abort_becomes_a_line_and_exit_code_1(tmp_path):
    found = ended(start(tmp_path, JOINED + "if process == 1: os.abort()\ntime.sleep(60)"))
    assert [code for code, _ in found] == [1, 1, 1]
    assert found[1][1].startswith("error: process 1: JAX gave up") and found[1][1].count("\n") == 1
    assert found[0][1] == found[2][1] == f"error: process 1 of 3 (on {HOST}) is gone; continue with: resume\n"


def test_whoever_else_knocks_is_turned_away(tmp_path):
    waiting = "while not (folder / 'go').exists(): time.sleep(0.02)\nlifeline.leave()"
    processes = start_joined(tmp_path, waiting)
    port = json.loads((tmp_path / "0.json").read_text())["port"]
    for hello in (b"GET / HTTP/1.1\r\n\r\n", b'{"token": "guess", "process": 1}\n', b"[1]\n"):
        with socket.create_connection(("127.0.0.1", port), 10) as stranger:
            stranger.sendall(hello)
            stranger.settimeout(10)
            assert stranger.recv(10) == b""
    (tmp_path / "go").touch()
    assert ended(processes) == [(0, "")] * 3
