"""Wall time of a step's phases, and how often XLA compiled meanwhile."""

import time

import jax


class Clock:
    """Wall time of the phases of a step, in seconds, under time/<phase>_s; a phase that comes again adds."""

    def __init__(self):
        self.seconds, self._last = {}, time.perf_counter()

    def lap(self, phase: str) -> None:
        now, key = time.perf_counter(), f"time/{phase}_s"
        self.seconds[key], self._last = self.seconds.get(key, 0.0) + now - self._last, now


class CompilationCounter:
    """Counts XLA compilations of this process, so that a run that recompiles after warm-up shows it."""

    def __init__(self):
        self._events = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, _seconds: float, **_) -> None:
        self._events += event == "/jax/core/compile/backend_compile_duration"

    def since_last(self) -> int:
        found, self._events = self._events, 0
        return found
