"""Several processes, one a host or one a GPU, that run one program on one mesh: JAX's multi-controller runtime.

    --coordinator HOST:PORT --processes N --process I       or in the environment, see `explicit`
    SLURM (srun), Open MPI, Kubernetes jobs, TPU slices     found out by JAX itself
    none of these                                           one process

Here stands when to ask JAX for it, what to say when it fails, and how all end together. What the processes tell each
other goes through exchange.py, the end of all when one is lost through lifeline.py.

Left out: runs that shrink or grow while they run. A lost process ends the run, which resumes on as many as there are.
"""

import contextlib
import functools
import importlib.util
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sharding import exchange
from sharding.lifeline import Lifeline, last_line, on_abort

COUNT = ("JAX_NUM_PROCESSES", "JAX_PROCESS_COUNT", "NNODES")  # variables, the first that is set counts
NUMBER = ("JAX_PROCESS_ID", "JAX_PROCESS_INDEX", "NODE_RANK", "JOB_COMPLETION_INDEX")
HEARTBEAT_S = 40  # JAX ends all processes when it has not heard of one for so long
JOIN_S = 300  # for the last process to start
_lifeline: Lifeline | None = None  # of this process, while there are several; as jax.distributed, it belongs to it


class Given(NamedTuple):
    """What names the processes of a run outright."""

    coordinator: str | None = None  # HOST:PORT of process 0
    processes: int | None = None
    process: int | None = None


def explicit(given: Given, environment: Mapping[str, str]) -> Given:
    """The flags, completed from the environment; all None where no coordinator is named.

    JAX_COORDINATOR_ADDRESS (with its port, or with JAX_COORDINATOR_PORT), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Also
    read, in this order: JAX_PROCESS_COUNT and JAX_PROCESS_INDEX; NNODES and NODE_RANK, which xpk sets on GPUs; and
    JOB_COMPLETION_INDEX, which an indexed Kubernetes job sets.
    Raises ValueError, one line, where a part is missing or impossible.
    """
    coordinator = given.coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    if not coordinator:
        for flag, value in (("--processes", given.processes), ("--process", given.process)):
            if value is not None:
                raise ValueError(f"{flag} {value}: give --coordinator HOST:PORT as well, the address of process 0")
        return Given()
    if ":" not in coordinator and "JAX_COORDINATOR_PORT" in environment:
        coordinator += f":{environment['JAX_COORDINATOR_PORT']}"
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--coordinator {coordinator}: expected HOST:PORT of process 0, such as node1:8476")

    processes = _number("--processes", given.processes, COUNT, environment)
    process = _number("--process", given.process, NUMBER, environment)
    if not 0 <= process < processes:
        raise ValueError(f"--process {process}: with --processes {processes} it is one of 0 to {processes - 1}")
    return Given(coordinator, processes, process)


def _number(flag: str, value: int | None, names: tuple[str, ...], environment: Mapping[str, str]) -> int:
    name = next((name for name in names if name in environment), None)
    if value is not None:
        return value
    if name is None:
        raise ValueError(f"--coordinator needs {flag} too, or {names[0]} in the environment")
    if not environment[name].isdecimal():
        raise ValueError(f"{name}={environment[name]}: expected a whole number")
    return int(environment[name])


def surroundings(environment: Mapping[str, str]) -> str | None:
    """What seems to have started several processes that JAX can find by itself; None: nothing."""
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environment for name in slurm) and int(environment["SLURM_NTASKS"]) > 1:
        return "SLURM"
    if "OMPI_MCA_orte_hnp_uri" in environment and int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    if "tpu" in environment.get("JAX_PLATFORMS", "tpu") and importlib.util.find_spec("libtpu"):
        if "," in workers or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1:
            return "TPU slice"
        chips = [path for pattern in ("accel[0-9]*", "vfio/[0-9]*") for path in Path("/dev").glob(pattern)]
        if chips and not workers and "TPU_SKIP_MDS_QUERY" not in environment:
            return "TPU slice"  # of one host perhaps: the machine's metadata tell
    if {"JOB_COMPLETION_INDEX", "KUBERNETES_SERVICE_HOST"} <= environment.keys() and not workers:
        return "Kubernetes" if importlib.util.find_spec("kubernetes") else None
    return None


def initialize(given: Given, environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes where there are any. Call it once, before the first device is touched.

    Raises ValueError, one line, where what was given is impossible or the others cannot be joined.
    """
    global _lifeline
    named = explicit(given, environment)
    where = named.coordinator or surroundings(environment)
    if where is None or named.processes == 1:
        return
    settings: dict[str, Any] = {"heartbeat_timeout_seconds": HEARTBEAT_S, "initialization_timeout": JOIN_S}
    if named.coordinator:
        settings |= {"coordinator_address": named.coordinator, "num_processes": named.processes}
        settings |= {"process_id": named.process, "cluster_detection_method": "deactivate"}
    elif where == "SLURM" and "JAX_LOCAL_DEVICE_IDS" not in environment and not _shares_gpus(environment):
        settings["local_device_ids"] = []  # all that it sees: JAX would take the one with the task's number on its host
    on_abort(functools.partial(_not_joined, where))  # what JAX does about a process that does not come
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow a SIGTERM while a run is set up
    try:
        jax.distributed.initialize(**settings)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{where}: {reason}: is the port free on the host of process 0?") from error
    if jax.process_count() > 1:
        _lifeline = Lifeline.join(jax.process_index(), exchange.gather)


def _not_joined(where: str) -> None:
    last_line(f"{where}: not all processes came together in {JOIN_S} s: start all of them, with the same address")
    os._exit(1)


def _shares_gpus(environment: Mapping[str, str]) -> bool:
    """Whether a SLURM task sees GPUs that belong to other tasks of its host."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")  # 8(x2): eight on each of two hosts
    return not tasks.startswith(("1(", "1,")) and tasks != "1" and "," in environment.get("CUDA_VISIBLE_DEVICES", ",")


def shutdown() -> None:
    """Ends the run's processes together, as they should end."""
    global _lifeline
    if _lifeline is not None:
        exchange.barrier("end")
        _lifeline.leave()
        _lifeline = None
        jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this is the process that writes what is written once: logs, pictures, configuration, manifests."""
    return _lifeline is None or _lifeline.process == 0


class _Elsewhere:
    """Takes every call and does nothing."""

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_, **__: None

    def __enter__(self) -> "_Elsewhere":
        return self

    def __exit__(self, *_) -> None:
        pass


def on_first(make: Callable, *arguments) -> Any:
    """make(*arguments) on the first process; elsewhere an object that takes every call and does nothing."""
    return make(*arguments) if is_first() else _Elsewhere()


def advise(text: str) -> None:
    """What to say behind the reason when a process is lost from here on."""
    if _lifeline is not None:
        _lifeline.advice = text


def end(code: int, line: str) -> None:
    """Ends all processes; one of them prints the line. Returns where there is one process."""
    if _lifeline is not None:
        _lifeline.end(code, line, everywhere=False)


@contextlib.contextmanager
def shared_fate(but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Within it, an exception of one process, `but` some, ends all: the others would wait for it for ever.

    Put it innermost, because what is closed on the way out may wait for the others too.
    """
    try:
        yield
    except BaseException as error:
        if _lifeline is not None and not isinstance(error, but):
            _end_for(error, _lifeline)
        raise


def _end_for(error: BaseException, lifeline: Lifeline) -> None:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if isinstance(error, exchange.Disagreement):
        lifeline.end(1, str(error), everywhere=False)  # all have found it
    if isinstance(error, jax.errors.JaxRuntimeError):
        lifeline.wait()  # a collective breaks when another process is gone, and the lifeline knows which
    traceback.print_exception(error)
    lifeline.end(1, f"process {lifeline.process} failed: {reason}", everywhere=True)
