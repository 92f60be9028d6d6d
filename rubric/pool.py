"""Worker processes for graders that can hang: a limit of time for each row, and a hung or dead worker is replaced.

A worker is a new interpreter that runs `serve` of rubric/grading.py and nothing else. It never sees the trainer's
__main__ (multiprocessing's spawn would import it again, and JAX with it). It talks over a socket pair: its first line
says what it could not load, rows come down pickled, a chunk at a time, and each row's result goes up at once as a line
of JSON, so that the clock of the next row starts and only the row that hangs is lost. A worker whose trainer is gone
reads the end of the socket and exits. When an environment answers nothing any more, the rest of its rows are given up
after IN_A_ROW times the limit of time.

Left out: a limit of memory, because a user's own grader may need much; a worker asks the kernel to be the first to go.
"""

import json
import os
import pickle
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path

from rubric.checks import Checked
from rubric.grading import Result, Task, reason_of

CHUNK = 16  # rows handed over at once at most: a message costs about as much as a cheap grade
START_S = 60.0  # seconds until a worker is ready; importing computer algebra takes some
STARTS = 3  # failed starts in one batch before the rest of the batch is given up
IN_A_ROW = 8  # rows of one environment lost with no answer in between (twice the workers if that is more): it is down


def _spoken(line: bytes) -> Result | Checked:
    """What `_answer` of rubric/grading.py made, from its line: a check's has three parts."""
    parts = json.loads(line)
    return Result(*parts) if len(parts) == 2 else Checked(*parts)


class _Worker:
    """One process: its socket, the rows it was given and has not answered, and until when it must speak."""

    def __init__(self, environments: Sequence[str]):
        self.channel, theirs = socket.socketpair()
        self.channel.settimeout(START_S)  # of a send to a stopped process
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join([root, *(entry or os.getcwd() for entry in sys.path)])
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-c",
                f"from rubric.grading import serve; serve({theirs.fileno()}, {[*environments]!r})",
            ],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a user's grader prints belongs with the log
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},  # the accelerator is the trainer's
            start_new_session=True,  # Ctrl-C is for the trainer, which then closes the pool
        )
        theirs.close()
        self.ready = False
        self.rows: deque[int] = deque()  # indices of tasks
        self.partial = b""
        self.deadline = time.monotonic() + START_S

    def lines(self) -> list[bytes]:
        """What arrived, in whole lines. Raises OSError when the process is gone."""
        data = self.channel.recv(1 << 16)
        if not data:
            raise ConnectionResetError
        *whole, self.partial = (self.partial + data).split(b"\n")
        return whole

    def stop(self) -> int:
        """Ends the process if it lives. Returns its exit status, negative for a signal."""
        self.channel.close()
        try:
            self.process.wait(0.2)  # one that is ending anyway tells its own status
        except subprocess.TimeoutExpired:
            self.process.kill()
        return self.process.wait()


class _Batch:
    """The tasks of one call and what has become of them."""

    def __init__(self, tasks: Sequence[Task]):
        self.tasks = tasks
        self.results: dict[int, Result | Checked] = {}
        # Shuffled, always the same way: samples of one prompt are neighbours, and often hang together.
        self.queue = deque(sorted(range(len(tasks)), key=lambda index: index * 2654435761 % 2**32))
        self.lost: Counter[str] = Counter()  # rows in a row, an environment
        self.failed_starts = 0

    def settle(self, index: int, result: Result | Checked, lost: bool = False) -> None:
        self.results[index] = result
        environment = self.tasks[index].environment
        self.lost[environment] = self.lost[environment] + 1 if lost else 0

    def give_up(self, limit: int) -> None:
        """Settles the queued rows that nobody will answer."""
        if self.failed_starts < STARTS and not any(lost >= limit for lost in self.lost.values()):
            return
        for index in list(self.queue):
            if self.failed_starts >= STARTS:
                self.results[index] = Result(None, "no worker process starts")
            elif self.lost[self.tasks[index].environment] >= limit:
                self.results[index] = Result(None, f"given up: the {limit} rows before it were lost")
            else:
                continue
            self.queue.remove(index)


class WorkerPool:
    """Grades tasks in `workers` processes; a task gets `timeout_s` seconds. Not for several threads at once."""

    def __init__(self, environments: Sequence[str], workers: int, timeout_s: float):
        self._environments, self._timeout_s = [*environments], timeout_s
        self._workers = [_Worker(environments) for _ in range(workers)]
        self._broken: dict[str, str] | None = None  # None until a worker has tried to load them

    def broken(self) -> dict[str, str]:
        """What the workers cannot load, with place and reason; waits until one has tried."""
        batch = _Batch([])
        while self._broken is None and batch.failed_starts < STARTS:
            self._listen(batch, max(0.0, min(worker.deadline for worker in self._workers) - time.monotonic()))
        if self._broken is None:
            return {
                name: f"{name}: no worker process starts: it ends or hangs on import" for name in self._environments
            }
        return self._broken

    def run(self, tasks: Sequence[Task]) -> list[Result | Checked]:
        """One result a task, in order. Always returns: a task that hangs or kills its worker gets one with a reason."""
        batch = _Batch(tasks)
        for worker in [worker for worker in self._workers if worker.rows]:  # an earlier call was interrupted
            worker.rows.clear()
            self._lose(worker, batch, "interrupted")
        self._listen(batch, 0.0)  # what happened since the last call
        while len(batch.results) < len(tasks):
            batch.give_up(max(IN_A_ROW, 2 * len(self._workers)))
            for worker in [*self._workers]:
                if worker.ready and not worker.rows:
                    self._send(worker, batch)
            if len(batch.results) < len(tasks):
                due = min(worker.deadline for worker in self._workers)
                self._listen(batch, min(max(0.0, due - time.monotonic()), START_S))
        return [batch.results[index] for index in range(len(tasks))]

    def _send(self, worker: _Worker, batch: _Batch) -> None:
        """Hands over a chunk; shorter ones towards the end, so that the workers finish together."""
        chunk = []
        size = max(1, min(CHUNK, len(batch.queue) // (4 * len(self._workers))))
        while batch.queue and len(chunk) < size:
            index = batch.queue.popleft()
            try:
                chunk.append(pickle.dumps(tuple(batch.tasks[index])))
                worker.rows.append(index)
            except Exception as error:  # pickle lets through whatever an object's own code raises
                batch.settle(index, Result(None, reason_of(error)))
        if not chunk:
            return
        try:
            worker.channel.sendall(pickle.dumps(chunk))
            worker.deadline = time.monotonic() + self._timeout_s
        except OSError:
            batch.queue.extendleft(reversed(worker.rows))  # none of them is to blame
            worker.rows.clear()
            self._lose(worker, batch, "")

    def _listen(self, batch: _Batch, seconds: float) -> None:
        """Waits until a worker speaks, then takes what all have said and replaces those that are dead or overdue."""
        speaking = wait([worker.channel for worker in self._workers], seconds)
        for worker in [worker for worker in self._workers if worker.channel in speaking]:
            try:
                for line in worker.lines():
                    if worker.ready:
                        batch.settle(worker.rows.popleft(), _spoken(line))
                    else:
                        worker.ready, self._broken = True, json.loads(line)
                    worker.deadline = time.monotonic() + self._timeout_s if worker.rows else float("inf")
            except OSError:
                self._lose(worker, batch, "")
        now = time.monotonic()
        for worker in [worker for worker in self._workers if worker.deadline < now]:
            self._lose(worker, batch, f"timeout: over {self._timeout_s:g} s")

    def _lose(self, worker: _Worker, batch: _Batch, reason: str) -> None:
        """A new worker in the place of one that is dead or hangs; the row it was at is lost, its others wait again."""
        if reason:
            worker.process.kill()
        status = worker.stop()
        if worker.rows:
            result = Result(None, reason or f"worker process died with status {status}")
            batch.settle(worker.rows.popleft(), result, lost=True)
            batch.queue.extendleft(reversed(worker.rows))
        elif not worker.ready:
            batch.failed_starts += 1
        self._workers[self._workers.index(worker)] = _Worker(self._environments)

    def close(self) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.stop()
        self._workers = []
