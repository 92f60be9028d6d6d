"""The lock of a run folder: one holder at a time, freed with its process, whatever graders of its live on."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from infinite_jax.lock import RunLock

ROOT = Path(__file__).resolve().parent.parent
HOLDER = """
import subprocess, sys, time
from pathlib import Path
from infinite_jax.lock import RunLock

with RunLock() as lock:
    lock.take(Path(sys.argv[1]))
    grader = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
    print(grader.pid, flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path):
    folder = tmp_path / "runs" / "one"
    with RunLock() as first, RunLock() as second:
        first.take(folder)
        first.take(folder)  # held already
        with pytest.raises(ValueError) as error:
            second.take(folder)
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        assert str(error.value).startswith(f"{folder}: in use by {holder}: wait") and "\n" not in str(error.value)
        second.take(tmp_path / "two")
    with RunLock() as third:
        third.take(folder)
    assert {path.name for path in folder.iterdir()} == {"lock"}


def test_kill_9_frees_it_though_a_child_of_the_holder_lives_on(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    grader = int(holder.stdout.readline())
    try:
        with RunLock() as lock:
            with pytest.raises(ValueError, match=f"in use by process {holder.pid} on "):
                lock.take(tmp_path)
            holder.kill()
            holder.communicate()
            os.kill(grader, 0)  # is alive
            lock.take(tmp_path)
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")
    finally:
        holder.kill()
        os.kill(grader, 9)


def test_a_file_system_without_locks_is_said_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with RunLock() as one, RunLock() as other:
        one.take(tmp_path)
        other.take(tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(f"warning: {tmp_path}: its file system has no locks" in line for line in said)
