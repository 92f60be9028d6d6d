"""A user's environment module, run in processes of its own: one that hangs or dies costs its row, never the trainer.

Each process is a new interpreter that imports no JAX, loads the file and answers one request at a time, in lines of
JSON. A call that finds all processes busy waits for one. What the module prints belongs with the log.
"""

import json
import os
import queue
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rubric.environments.protocol import Message, Unavailable, checked_turns, module_functions

START_S = 60.0  # seconds until a file is loaded; what it imports may take some
MOST = 16 << 20  # bytes of one answer
IN_A_ROW, REST_S = 8, 60.0  # calls without an answer, after which the next fail at once for so many seconds


def serve(path: str) -> None:
    """The life of a process: load the file, answer requests on stdin until it ends."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**answer) -> None:
        channel.write(json.dumps(answer) + "\n")
        channel.flush()

    try:
        interact, grade = module_functions(path)
    except (Exception, SystemExit) as error:
        say(error=_reason(error))
        return
    say(ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["verb"] == "grade":
                value = grade(request["messages"], request["answer"])
            else:
                value = checked_turns(interact(request["messages"])) if interact else []
            say(value=value)
        except (Exception, SystemExit) as error:
            say(error=_reason(error))


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (f"{type(error).__name__}: {text}" if text else type(error).__name__)[:200]


class _Process:
    def __init__(self, path: str):
        root = str(Path(__file__).resolve().parents[2])
        places = os.pathsep.join([root, *(entry or os.getcwd() for entry in sys.path)])
        code = f"from rubric.environments.user_module import serve; serve({path!r})"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": places, "JAX_PLATFORMS": "cpu"},  # the accelerator is the trainer's
            start_new_session=True,
        )
        try:
            self.answer(START_S)
        except Exception:
            self.stop()
            raise

    def ask(self, request: dict, seconds: float) -> object:
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise Unavailable(f"the environment's process died with status {self.process.wait(5)}") from error
        return self.answer(seconds)

    def answer(self, seconds: float) -> object:
        """The next line's value. Raises Unavailable when none comes, ValueError for what the module raised."""
        data, deadline = b"", time.monotonic() + seconds
        while not data.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise Unavailable(f"timeout: over {seconds:g} s")
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            if not more:
                raise Unavailable(f"the environment's process died with status {self.process.wait(5)}")
            data += more
            if len(data) > MOST:
                raise Unavailable(f"the environment answered with over {MOST} bytes")
        answer = json.loads(data)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer.get("value")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                pipe.close()
            except OSError:
                pass  # unwritten bytes for a process that is gone


class _GivenUp(Unavailable):
    """Not asked."""


class UserModule:
    """The environment of a .py file, see protocol.is_environment. Close it: it owns processes.

    Args:
      processes: at most so many run at once; all but the first are started when needed.
      timeout_s: seconds one call may take; past it the process is replaced and Unavailable raised.

    Raises ValueError, one line, when the file does not load.
    """

    def __init__(self, path: str, processes: int, timeout_s: float):
        self._path, self._timeout_s = os.path.abspath(path), timeout_s
        self._free: queue.Queue[_Process | None] = queue.Queue()  # None: may be started
        try:
            self._free.put(_Process(self._path))  # now, so that a file that does not load ends the run at its start
        except (ValueError, Unavailable) as error:
            raise ValueError(f"environment {path!r} does not load: {error}") from error
        for _ in range(processes - 1):
            self._free.put(None)
        self._lost, self._again = 0, 0.0  # calls lost in a row; a race between threads costs a call more or less

    def interact(self, messages: Sequence[Message]) -> list[Message]:
        return self._ask({"verb": "interact", "messages": [*messages]})

    def grade(self, messages: Sequence[Message], answer: object) -> float:
        return self._ask({"verb": "grade", "messages": [*messages], "answer": answer})

    def _ask(self, request: dict) -> object:
        process = self._free.get()
        try:
            if self._lost >= IN_A_ROW and time.monotonic() < self._again:
                raise _GivenUp(f"given up for {REST_S:g} s: {self._lost} calls before it were lost")
            process = process or _Process(self._path)
            answer = process.ask(request, self._timeout_s)
            self._lost = 0
            return answer
        except _GivenUp:
            raise
        except (Unavailable, OSError):
            self._lost, self._again = self._lost + 1, time.monotonic() + REST_S
            if process is not None:
                process.stop()
                process = None
            raise
        finally:
            self._free.put(process)

    def close(self) -> None:
        for _ in range(self._free.qsize()):
            process = self._free.get()
            if process is not None:
                process.stop()
            self._free.put(None)
