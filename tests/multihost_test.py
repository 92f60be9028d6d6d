"""Several processes on loopback: how they find each other, and that they make the run that one process makes."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from infinite_jax import record, resume, run_folder, session, train
from infinite_jax.lock import RunLock
from sharding import exchange, multihost
from sharding.mesh import AXES
from sharding.multihost import Given

ROOT = Path(__file__).resolve().parent.parent
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # to compile, not to run
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}  # fmt: skip


@pytest.mark.parametrize(
    "given, environment, expected",
    [
        (Given(), {}, Given()),
        (Given("a:1", 2, 1), {}, Given("a:1", 2, 1)),
        (Given(), {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}, ("a:1", 4, 3)),
        (Given("b:2", process=0), {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4"}, ("b:2", 4, 0)),
        (  # what xpk sets for GPUs
            Given(),
            {"JAX_COORDINATOR_ADDRESS": "a", "JAX_COORDINATOR_PORT": "6002", "NNODES": "2", "NODE_RANK": "1"},
            ("a:6002", 2, 1),
        ),
        (Given("a:1", 2), {"JOB_COMPLETION_INDEX": "1"}, ("a:1", 2, 1)),
        (Given("[::1]:9", 1, 0), {}, ("[::1]:9", 1, 0)),
    ],
)
def test_flags_and_variables_name_the_processes(given, environment, expected):
    assert multihost.explicit(given, environment) == expected


@pytest.mark.parametrize(
    "given, environment, words",
    [
        (Given(processes=2), {}, ["--processes 2", "--coordinator HOST:PORT"]),
        (Given(process=1), {}, ["--process 1", "--coordinator HOST:PORT"]),
        (Given("node1", 2, 0), {}, ["--coordinator node1", "node1:8476"]),
        (Given("node1:x", 2, 0), {}, ["--coordinator node1:x"]),
        (Given("a:1", process=0), {}, ["--processes", "JAX_NUM_PROCESSES"]),
        (Given("a:1", 2), {}, ["--process", "JAX_PROCESS_ID"]),
        (Given("a:1", 2), {"JAX_PROCESS_ID": "x"}, ["JAX_PROCESS_ID=x", "whole number"]),
        (Given("a:1", 2, 2), {}, ["--process 2", "0 to 1"]),
    ],
)
def test_what_does_not_go_together_is_one_line(given, environment, words):
    with pytest.raises(ValueError) as caught:
        multihost.explicit(given, environment)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        (SLURM, "SLURM"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}, None),  # sbatch without srun
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:9", "OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, "TPU slice"),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "TPU slice"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
        ({"JOB_COMPLETION_INDEX": "0", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "Kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
def test_launchers_are_known_by_what_they_set(environment, expected, monkeypatch):
    monkeypatch.setattr(multihost.importlib.util, "find_spec", lambda name: name)  # libtpu, kubernetes
    assert multihost.surroundings(environment) == expected


@pytest.mark.parametrize(
    "environment, shares",
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, False),
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": "0,1"}, False),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "4,3", "CUDA_VISIBLE_DEVICES": "2"}, False),  # bound to its own by SLURM
    ],
)
def test_a_slurm_task_takes_one_gpu_only_where_it_sees_those_of_others(environment, shares):
    assert multihost._shares_gpus(environment) == shares


def test_one_process_has_nothing_to_exchange():
    rows, grade_B = np.array([True, True, True]), np.array([1.0, np.nan, 3.0], np.float32)
    assert exchange.gather({"a": 1}) == [{"a": 1}] and exchange.from_first(2) == 2
    assert exchange.rows(rows, (grade_B,))[0] is grade_B
    number_R, value_R = exchange.held(jax.numpy.arange(6).reshape(3, 2))
    np.testing.assert_array_equal(number_R, [0, 1, 2])
    np.testing.assert_array_equal(value_R, [[0, 1], [2, 3], [4, 5]])
    assert multihost.is_first() and multihost.on_first(list, "ab") == ["a", "b"]


def mesh(*sizes: int) -> list[str]:
    return [f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes)]


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def begin(arguments: list[str], processes: int, devices: int, last: Sequence[str] = ()) -> list[subprocess.Popen]:
    """`python -m ARGUMENTS`, or of a script, in so many processes of so many devices; `last`: the last one's own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    named = {} if processes == 1 else {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    command = [sys.executable, *([] if arguments[0].endswith(".py") else ["-m"]), *map(str, arguments)]
    return [
        subprocess.Popen(
            [*command, *(last if p == processes - 1 else ())], cwd=ROOT,
            env=environment | named | {"JAX_PROCESS_ID": str(p)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for p in range(processes)
    ]  # fmt: skip


def end(started: list[subprocess.Popen]) -> list[Ended]:
    try:
        said = [process.communicate(timeout=540) for process in started]
    finally:
        for process in started:
            process.kill()
    return [Ended(process.returncode, *texts) for process, texts in zip(started, said)]


def run(arguments: list[str], processes: int, devices: int) -> list[Ended]:
    found = end(begin(arguments, processes, devices))
    assert all(each.code == 0 for each in found), found
    return found


@pytest.fixture(scope="module")
def setting(small_run, tmp_path_factory) -> list[str]:
    """Arguments of a run of seconds: a policy of 17,000 parameters, one bucket, grades that look random but are not."""
    folder = tmp_path_factory.mktemp("setting")
    text = (
        "domains:\n"
        "  - {name: copy, train: 'gen:copy,size=7', test: 'gen:copy,split=test,size=5', GRADER}\n"
        "  - {name: add, train: 'gen:add,size=50', test: 'gen:add,split=test,size=5', GRADER}\n"
        "run: {steps: 6, eval_every: 2, checkpoint_every: 2, keep_last: 9, check_every: 1}\n"
        "algorithm: {prompts: 4, group_size: 2, prompt_buckets: [32], max_new_tokens: 4, learning_rate: 0.01}\n"
        "eval: {batch: 8, canary: false}\n"
        "curriculum: {single_every: 3}\n"
        "rubric: {workers: 1}\n"
    )
    return small_run(folder, text)


def timeless(folder: Path) -> list[dict]:
    rows = record.read(folder / record.METRICS)
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def host_state(folder: Path):
    """The triage state and the data position of a run's newest checkpoint, read by this process."""
    opened = session.open_session(run_folder.load_config(folder, mesh(1, 1, 1, 1)))
    opened.close()
    state = run_folder.checkpoints(folder).restore(run_folder.abstract(opened.state))[1]
    return state._replace(train=None)


def assert_same_run(a: Path, b: Path) -> None:
    """Text, grades, triage state and data position alike; what is computed from them within float32 rounding."""
    assert len(timeless(a)) == len(timeless(b)) > 1
    for x, y in zip(timeless(a), timeless(b)):
        assert x.keys() == y.keys()
        for key in x:
            if x[key] is None or key.startswith(("tokens/", "pass_rate/", "eval/", "reward/")):
                assert x[key] == y[key], (x["step"], key)
            else:
                assert x[key] == pytest.approx(y[key], rel=1e-4, abs=2e-6), (x["step"], key)
    for name in (record.EVENTS, record.TRANSCRIPTS):
        assert record.read(a / name) == record.read(b / name)
    for x, y in zip(jax.tree.leaves(host_state(a)), jax.tree.leaves(host_state(b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)  # compiled with other flags, float32 may round otherwise


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(setting, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    started = begin(["infinite_jax.train", *setting, f"run.dir={two}", "run.steps=2"], processes=2, devices=1)
    assert train.main([*setting, f"run.dir={one}", "run.steps=2"]) == 0
    first, second = end(started)
    assert first.code == second.code == 0, (first, second)
    assert f"run: {two}" in first.out and "step" not in second.out
    assert_same_run(one, two)


@pytest.fixture(scope="module")
def straight(setting, tmp_path_factory) -> Path:
    """Six steps of one process with one device."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    assert train.main([*setting, f"run.dir={folder}"]) == 0
    return folder


EXCHANGED = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from sharding import exchange, mesh, multihost

multihost.initialize(multihost.Given())
me, count = jax.process_index(), jax.process_count()
assert exchange.gather({"me": me}) == [{"me": p} for p in range(count)]
assert exchange.gather("x" * (3000 * me)) == ["x" * (3000 * p) for p in range(count)]
assert exchange.from_first(f"of {me}") == "of 0"
made = mesh.build((1, 2, 1, 4))
whole_BT = np.arange(96).reshape(8, 12)
for spec in (P(), P("fsdp"), P(("data", "fsdp")), P(None, "tensor"), P("fsdp", "tensor"), P(("fsdp", "tensor"))):
    x = jax.make_array_from_callback((8, 12), NamedSharding(made, spec), lambda part: whole_BT[part])
    np.testing.assert_array_equal(exchange.whole(x), whole_BT)
    number_R, value_RT = exchange.held(x)
    np.testing.assert_array_equal(value_RT, whole_BT[number_R])
    everyone = exchange.gather(number_R.tolist())
    assert sorted(sum(everyone, [])) == list(range(8)), everyone  # each row once
    mine_B = np.isin(np.arange(8), number_R)
    grade_B = np.where(mine_B, np.arange(8) / 3, np.nan).astype(np.float32)
    found_B, none_BK, flag_B = exchange.rows(mine_B, (grade_B, np.zeros((8, 0), np.float32), mine_B))
    np.testing.assert_array_equal(found_B, (np.arange(8) / 3).astype(np.float32))
    assert none_BK.shape == (8, 0) and flag_B.all()
same = exchange.replicated(made, {"a": np.arange(3), "b": np.float32(2)})
exchange.check_same(same, "step 1")
last = jax.make_array_from_callback((2,), NamedSharding(made, P()), lambda part: np.array([1, me == count - 1])[part])
with multihost.shared_fate():
    exchange.check_same(same | {"c": {"d": last}}, "step 2")
"""


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_is_exchanged_arrives_and_a_difference_is_named(tmp_path, processes):
    (tmp_path / "script.py").write_text(EXCHANGED)
    found = end(begin([str(tmp_path / "script.py")], processes, 8 // processes))
    assert [each.code for each in found] == [1] * processes, found
    line = f"error: step 2: c.d of process {processes - 1} is not that of process 0\n"
    assert [line in each.err for each in found] == [True] + [False] * (processes - 1), found


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, devices, options",
    [
        (2, 4, mesh(2, 2, 2, 1)),
        (4, 2, mesh(2, 2, 1, 2)),
        (2, 1, mesh(1, 1, 1, 2)),  # a row's replicas on both
    ],
)
def test_meshes_over_processes_make_the_run_of_one(setting, straight, tmp_path, processes, devices, options):
    run(["infinite_jax.train", *setting, f"run.dir={tmp_path / 'run'}", *options], processes, devices)
    assert_same_run(straight, tmp_path / "run")


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_processes_and_devices(setting, straight, tmp_path):
    folder = tmp_path / "run"
    run(["infinite_jax.train", *setting, f"run.dir={folder}", "run.steps=2", *mesh(4, 2, 1, 1)], 2, 4)
    run(["infinite_jax.resume", str(folder), "run.steps=4", *mesh(2, 4, 1, 1)], 1, 8)
    assert resume.main([str(folder), "run.steps=6", *mesh(1, 1, 1, 1)]) == 0
    assert_same_run(straight, folder)
    shown = run(["infinite_jax.evaluate", str(folder), *mesh(2, 1, 1, 1)], 2, 1)
    assert "macro average" in shown[0].out and "macro average" not in shown[1].out


@pytest.mark.slow
def test_times_and_repeated_draws_leave_processes_alike(setting, tmp_path):
    """Costs in seconds enter the triage state, and each process has its own clock; run.check_every=1 compares."""
    options = ["curriculum=dynamic", "curriculum.capacity=seconds", "run.steps=4"]
    run(["infinite_jax.train", *setting, f"run.dir={tmp_path / 'run'}", *options], 2, 1)
    assert max(row["rollout/rounds"] for row in timeless(tmp_path / "run")[1:]) > 1


def wait_for_rows(folder: Path, count: int, started: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 500
    path = folder / record.METRICS
    while not (path.is_file() and path.read_bytes().count(b"\n") >= count):
        assert all(process.poll() is None for process in started), end(started)
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_killed_ends_the_other_and_the_run_goes_on(setting, straight, tmp_path, victim):
    folder = tmp_path / "run"
    started = begin(["infinite_jax.train", *setting, f"run.dir={folder}", "run.steps=2000"], 2, 1)
    wait_for_rows(folder, 6, started)
    killed = time.monotonic()
    started[victim].kill()
    other = end(started)[1 - victim]
    assert other.code == 1 and time.monotonic() - killed < 60
    line = f"error: process {victim} of 2 (on {socket.gethostname()}) is gone; saved up to step "
    (said,) = [text for text in other.err.splitlines() if text.startswith("error: ")]
    assert said.startswith(line) and said.endswith(f"continue with: python -m infinite_jax.resume {folder}")
    saved = int(said.removeprefix(line).split(";")[0])
    assert saved >= 2 and saved in run_folder.checkpoints(folder).steps()
    steps = timeless(folder)[-1]["step"] // 2 * 2 + 2
    run(["infinite_jax.resume", str(folder), f"run.steps={steps}"], 2, 1)
    for x, y in zip(timeless(straight)[1:6], timeless(folder)[1:6]):
        assert x["reward/mean"] == y["reward/mean"]
    assert [row["step"] for row in timeless(folder)] == list(range(steps + 1))


@pytest.mark.slow
def test_a_signal_to_one_saves_and_stops_all(setting, straight, tmp_path):
    folder = tmp_path / "run"
    options = ["run.steps=2000", "run.checkpoint_every=100000"]
    started = begin(["infinite_jax.train", *setting, f"run.dir={folder}", *options], 2, 1)
    wait_for_rows(folder, 2, started)
    started[1].send_signal(signal.SIGTERM)
    first, second = end(started)
    assert first.code == second.code == 75, (first, second)
    assert f"infinite_jax.resume {folder}" in first.out and "stopped" not in second.out
    saved = run_folder.checkpoints(folder).steps()[-1]
    assert saved == timeless(folder)[-1]["step"] > 0
    assert resume.main([str(folder), f"run.steps={saved + 1}"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, own, words",
    [
        (["run.dir={taken}"], [], "is not empty"),
        (["eval.batch=0"], [], "eval.batch=0"),
        (["mesh.rollout_devices=1", *mesh(1, 1, 1, 1)], [], "needs one process"),
        ([], ["model.path=/nowhere/at/all"], "/nowhere/at/all"),  # as where one host lacks a file
    ],
)
def test_bad_input_is_said_once_and_ends_all_with_2(setting, tmp_path, options, own, words):
    (tmp_path / "file").touch()
    options = [option.format(taken=tmp_path) for option in options]
    found = end(begin(["infinite_jax.train", *setting, f"run.dir={tmp_path / 'run'}", *options], 2, 1, last=own))
    assert [each.code for each in found] == [2, 2], found
    (line,) = [line for each in found for line in each.err.splitlines() if "error: " in line]
    assert words in line and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_folder_in_use_is_said_once_and_ends_all_with_2(setting, tmp_path):
    with RunLock() as lock:
        lock.take(tmp_path / "run")
        found = end(begin(["infinite_jax.train", *setting, f"run.dir={tmp_path / 'run'}"], 2, 1))
    assert [each.code for each in found] == [2, 2], found
    (line,) = [line for each in found for line in each.err.splitlines() if "error: " in line]
    assert f"in use by process {os.getpid()} on " in line
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]
