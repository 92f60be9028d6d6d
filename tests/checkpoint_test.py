import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from infinite_jax import checkpoint, leaves, manifest
from infinite_jax.checkpoint import Checkpointer
from infinite_jax.types import RunState, TrainState

ROOT = Path(__file__).resolve().parent.parent


class Curriculum(NamedTuple):
    """Stands in for TriageState: one leaf of each dtype."""

    tries_D: jax.Array
    ema_D: jax.Array
    half_D: jax.Array
    seed: jax.Array
    known_D: jax.Array
    nothing: None


def run_state(fill: int, width: int = 8) -> RunState:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3)))
    params = {"embed": jnp.full((16, width), fill, jnp.bfloat16), "blocks": {"w": jnp.full((2, width), fill + 0.5)}}
    opt_state = jax.tree.map(lambda x: x + fill, optimizer.init(params))
    curriculum = Curriculum(
        tries_D=jnp.arange(3, dtype=jnp.int32) + fill,
        ema_D=jnp.array([0.1, jnp.nan, -0.0]) + fill,
        half_D=jnp.array([1.5, 2.5, -3.5], jnp.bfloat16),
        seed=jnp.array([2**32 - 1, fill], jnp.uint32),
        known_D=jnp.array([True, False, True]),
        nothing=None,
    )
    train = TrainState(params, opt_state, jnp.int32(fill))
    return RunState(train, curriculum, jnp.arange(3, dtype=jnp.int32) * fill, np.array([fill, 0, 1], np.int32))


def abstract(state):
    """ShapeDtypeStructs on one device; numpy leaves as they are."""
    return jax.tree.map(
        lambda x: (
            np.zeros_like(x)
            if isinstance(x, np.ndarray)
            else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        ),
        state,
    )


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y) and x.dtype == y.dtype and x.shape == y.shape, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def small(step: int) -> dict:
    return {"a": {"w": jnp.full((64,), step, jnp.int32)}, "b": jnp.int32(step)}


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records if record.name == checkpoint.__name__]


def saved(folder, steps, keep_last=10, keep_best=0):
    """Saves small(step) with score step / 10."""
    with Checkpointer(folder, keep_last, keep_best) as checkpointer:
        for step in steps:
            checkpointer.save(step, small(step), step / 10)
    return Checkpointer(folder, keep_last, keep_best)


def data_file(folder: Path) -> Path:
    """The largest file of array data of a step."""
    return max((path for path in folder.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path, at: int = -20):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_run_state_round_trip_bit_for_bit_with_types_and_shardings(tmp_path):
    state = run_state(3)
    with Checkpointer(tmp_path, 2, 1) as checkpointer:
        checkpointer.save(5, state, 0.25)
        step, restored = checkpointer.restore(abstract(state))
        assert step == 5
        assert_identical(restored, state)
        assert isinstance(restored.train.opt_state[1][0], optax.ScaleByAdamState)
        assert isinstance(restored.train.opt_state[0], optax.EmptyState)
        assert isinstance(restored.curriculum, Curriculum) and restored.curriculum.nothing is None
        assert all(
            x.sharding == y.sharding for x, y in zip(jax.tree.leaves(restored.train), jax.tree.leaves(state.train))
        )
        _, from_arrays = checkpointer.restore(state)
        assert_identical(from_arrays, state)
        _, part = checkpointer.restore({"curriculum": abstract(state.curriculum)})
        assert_identical(part["curriculum"], state.curriculum)


def test_what_is_saved_is_the_state_at_the_call_though_it_is_donated_or_changed_at_once(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 7, donate_argnums=0)
    with Checkpointer(tmp_path, 4, 0) as checkpointer:
        for step in range(1, 4):
            array, host = jnp.full((512, 1024), float(step)), np.full((1_000_000,), step, np.int32)
            checkpointer.save(step, {"a": {"x": array}, "b": host}, None)
            replaced = overwrite(array)
            host[:] = -1
            assert float(replaced[0, 0]) == -7  # a buffer that is still being written is not given away on CPU
            _, restored = checkpointer.restore({"a": {"x": replaced}, "b": host})
            np.testing.assert_array_equal(restored["a"]["x"], np.full((512, 1024), step, np.float32))
            np.testing.assert_array_equal(restored["b"], np.full((1_000_000,), step, np.int32))


def test_save_returns_before_the_manifest_is_written_and_wait_ends_with_it(tmp_path, monkeypatch):
    release = threading.Event()
    write = manifest.write
    monkeypatch.setattr(manifest, "write", lambda *args, **facts: (release.wait(20), write(*args, **facts)))
    with Checkpointer(tmp_path, 2, 0) as checkpointer:
        checkpointer.save(1, small(1), None)
        assert not manifest.exists(tmp_path / "1")
        release.set()
        checkpointer.wait()
        assert manifest.fault(tmp_path / "1") is None


def test_newest_and_best_are_kept(tmp_path):
    scores = [0.1, 0.9, 0.3, None, 0.8, 0.2, float("nan"), 0.7, None, 0.4]
    with Checkpointer(tmp_path, 2, 3) as checkpointer:
        for step, score in enumerate(scores, start=1):
            checkpointer.save(step, small(step), score)
        checkpointer.wait()
        assert checkpointer.steps() == [2, 5, 8, 9, 10]
        assert checkpointer.best_step() == 2
        step, restored = checkpointer.restore(small(0), "best")
        assert step == 2 and int(restored["b"]) == 2
    again = Checkpointer(tmp_path, 2, 3)
    assert again.restore(small(0))[0] == 10
    with again:
        again.save(11, small(11), 0.75)  # scores of an earlier process count: 0.7 is no longer among the best three
    assert again.steps() == [2, 5, 10, 11] and again.best_step() == 2


def test_steps_without_a_score(tmp_path):
    checkpointer = saved(tmp_path / "none", [])
    with checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, small(step), None)
    assert checkpointer.steps() == [1, 2, 3] and checkpointer.best_step() is None
    with pytest.raises(ValueError, match="no step has a score"):
        checkpointer.restore(small(0), "best")


def test_orbax_alone_restores_a_changed_value_in_silence(tmp_path):
    """Why there is a manifest. Should Orbax notice one day, this fails, and the manifest may go."""
    value = {"a": {"x": jax.random.normal(jax.random.key(0), (64, 64))}}
    with Checkpointer(tmp_path, 2, 0) as checkpointer:
        checkpointer.save(1, value, None)
        checkpointer.wait()
        flip(data_file(tmp_path / "1"), 5000)
        restored = leaves.read(tmp_path / "1", value)
        assert (np.asarray(restored["a"]["x"]) != np.asarray(value["a"]["x"])).sum() == 1
        with pytest.raises(ValueError, match="none of the checkpoints 1 is intact"):
            checkpointer.restore(value)


@pytest.mark.parametrize("damage", ["flipped byte", "missing file", "cut file", "cut manifest", "changed manifest"])
def test_a_damaged_newest_step_is_passed_over_and_kept(tmp_path, messages, damage):
    checkpointer = saved(tmp_path, [2, 4, 6])
    bad = data_file(tmp_path / "6")
    if damage == "flipped byte":
        flip(bad)
    elif damage == "missing file":
        bad.unlink()
    elif damage == "cut file":
        os.truncate(bad, bad.stat().st_size - 1)
    elif damage == "cut manifest":
        bad = tmp_path / "6" / manifest.NAME
        os.truncate(bad, 100)
    else:
        bad = tmp_path / "6" / manifest.NAME
        bad.write_text(bad.read_text().replace("0.6", "0.7"))
    before = sorted(path for path in (tmp_path / "6").rglob("*"))
    step, restored = checkpointer.restore(small(0))
    assert step == 4
    assert_identical(restored, small(4))
    (message,) = messages()
    assert str(bad) in message and "step 4" in message and "\n" not in message
    assert sorted(path for path in (tmp_path / "6").rglob("*")) == before


def test_saving_a_damaged_steps_number_again_moves_it_aside(tmp_path):
    checkpointer = saved(tmp_path, [2, 4, 6], keep_last=2)
    flip(data_file(tmp_path / "6"))
    first = data_file(tmp_path / "6").read_bytes()
    with checkpointer:
        assert checkpointer.restore(small(0))[0] == 4
        checkpointer.save(5, small(5), None)
        checkpointer.wait()
        assert checkpointer.steps() == [4, 5]  # 6 is not the newest any more: it does not push 4 out
        checkpointer.save(6, small(60), None)
        step, restored = checkpointer.restore(small(0))
        assert step == 6 and int(restored["b"]) == 60
    checkpointer = Checkpointer(tmp_path, 2, 0)
    flip(data_file(tmp_path / "6"))
    second = data_file(tmp_path / "6").read_bytes()
    with checkpointer:
        assert checkpointer.restore(small(0))[0] == 5
        checkpointer.save(6, small(600), None)
    assert checkpointer.steps() == [5, 6]
    assert data_file(tmp_path / "6.damaged").read_bytes() == first
    assert data_file(tmp_path / "6.damaged-2").read_bytes() == second


def test_going_back_to_an_older_step_sets_the_newer_ones_aside(tmp_path):
    checkpointer = saved(tmp_path, [2, 4, 6, 8], keep_last=3)
    with checkpointer:
        assert checkpointer.restore(small(0), 4)[0] == 4
        assert checkpointer.steps() == [4, 6, 8]  # reading changes nothing
        checkpointer.save(7, small(7), None)
        checkpointer.wait()
        assert checkpointer.steps() == [4, 7]
        checkpointer.restore(small(0), 4)  # once more, in the same process
        for step in (5, 6):
            checkpointer.save(step, small(step), None)
    assert checkpointer.steps() == [4, 5, 6]
    assert {path.name for path in tmp_path.glob("*.*")} == {"6.superseded", "8.superseded", "7.superseded"}


def test_a_second_checkpointer_that_is_told_where_the_run_goes_on(tmp_path):
    saved(tmp_path, [2, 4, 6], keep_last=2)
    flip(data_file(tmp_path / "6"))
    start, _ = Checkpointer(tmp_path, 1, 0).restore(small(0))
    with Checkpointer(tmp_path, 2, 0, after=start) as checkpointer:
        checkpointer.save(7, small(7), None)
    assert checkpointer.steps() == [4, 7] and (tmp_path / "6.damaged").exists()


def test_a_step_without_manifest_is_used_only_when_nothing_verified_is_left(tmp_path, messages):
    checkpointer = saved(tmp_path, [2, 4])
    (tmp_path / "4" / manifest.NAME).unlink()
    assert checkpointer.restore(small(0))[0] == 2
    assert f"{manifest.NAME} is missing" in messages()[0] and "trying step 2" in messages()[0]
    flip(data_file(tmp_path / "2"))
    step, restored = checkpointer.restore(small(0))
    assert step == 4 and int(restored["b"]) == 4
    assert "unverified" in messages()[-1]
    with checkpointer:
        checkpointer.save(6, small(6), None)
    assert checkpointer.steps() == [4, 6] and (tmp_path / "2.damaged").exists()
    data_file(tmp_path / "4").unlink()
    flip(data_file(tmp_path / "6"))
    with pytest.raises(ValueError, match="none of the checkpoints 6, 4 is intact: copy one back"):
        checkpointer.restore(small(0))


def test_of_the_steps_without_manifest_that_were_passed_over_only_the_last_is_kept(tmp_path):
    for lost in (3, 4):
        checkpointer = saved(tmp_path, [lost - 1, lost], keep_last=2)
        (tmp_path / str(lost) / manifest.NAME).unlink()
        with checkpointer:
            assert checkpointer.restore(small(0))[0] == lost - 1
            checkpointer.save(lost, small(lost), None)
        assert checkpointer.steps() == [lost - 1, lost]
    assert [path.name for path in tmp_path.glob("*.unverified")] == ["4.unverified"]


def test_a_given_or_the_best_step_falls_back_too(tmp_path):
    checkpointer = saved(tmp_path, [1, 2, 3])
    flip(data_file(tmp_path / "2"))
    assert checkpointer.restore(small(0), 2)[0] == 1
    flip(data_file(tmp_path / "3"))
    assert checkpointer.restore(small(0), "best")[0] == 1


def test_asking_for_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/none holds no checkpoint"):
        Checkpointer(tmp_path / "none", 1, 0).restore(small(0))
    assert not (tmp_path / "none").exists() and Checkpointer(tmp_path / "none", 1, 0).best_step() is None
    checkpointer = saved(tmp_path, [2, 4])
    with pytest.raises(ValueError, match=r"no checkpoint of step 3: choose one of \[2, 4\] or best"):
        checkpointer.restore(small(0), 3)
    with pytest.raises(ValueError, match="keep_last=0"):
        Checkpointer(tmp_path, 0, 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s | {"b": jnp.float32(0)}, r"leaf b is int32\[\] in the checkpoint and float32\[\] in this run"),
        (lambda s: s | {"a": {"w": jnp.zeros(32, jnp.int32)}}, r"leaf a.w is int32\[64\].* and int32\[32\]"),
        (lambda s: s | {"a": {"v": s["a"]["w"]}}, "leaf a.v is no such leaf in the checkpoint"),
        (lambda s: s | {"a": s["a"] | {"v": s["b"]}}, "leaf a.v is no such leaf in the checkpoint"),
        (lambda s: s | {"c": s["b"]}, "leaf c is no such leaf in the checkpoint"),
    ],
)
def test_another_tree_is_refused_by_leaf(tmp_path, change, reason):
    checkpointer = saved(tmp_path, [1, 2])
    with pytest.raises(ValueError, match=reason) as caught:
        checkpointer.restore(change(small(0)))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="one path"):
        checkpointer.save(3, {"a": {"b": {"c": jnp.int32(0)}, "b.c": jnp.int32(1)}}, None)


def test_an_error_in_the_background_is_raised_once_and_saving_goes_on(tmp_path):
    """Files limited to 100 kB stand in for a full disk; the array is random, so that it does not compress."""
    state = {"a": {"x": jax.random.normal(jax.random.key(0), (512, 512))}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpointer(tmp_path, 5, 0) as checkpointer:
        checkpointer.save(1, state, None)
        checkpointer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            checkpointer.save(2, state, None)
            with pytest.raises(Exception, match="File too large"):
                checkpointer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        checkpointer.wait()
        assert checkpointer.restore(state)[0] == 1
        checkpointer.save(3, state, None)
        with pytest.raises(ValueError, match="step 3 is not newer than step 3"):
            checkpointer.save(3, state, None)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "3"}


@pytest.mark.parametrize(
    ("name", "content"),
    [("metrics/metrics", ""), ("metrics/metrics", "[]"), ("_CHECKPOINT_METADATA", "[]"), ("a/_METADATA", "\0")],
)
def test_a_damaged_small_file_of_an_old_step_does_not_stop_the_run(tmp_path, name, content):
    checkpointer = saved(tmp_path, [1, 2], keep_last=2, keep_best=1)
    (tmp_path / "1" / name).write_text(content)
    with checkpointer:
        assert checkpointer.restore(small(0))[0] == 2
        checkpointer.save(3, small(3), 0.3)
        checkpointer.save(4, small(4), 0.4)
        assert checkpointer.restore(small(0))[0] == 4


def test_temporary_folders_go_with_the_first_save_and_not_by_reading(tmp_path, capfd):
    checkpointer = saved(tmp_path, [1])
    abandoned = tmp_path / "7.orbax-checkpoint-tmp"
    (abandoned / "a").mkdir(parents=True)
    assert checkpointer.steps() == [1] and checkpointer.restore(small(0))[0] == 1 and abandoned.exists()
    with checkpointer:
        checkpointer.save(2, small(2), None)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}
    assert capfd.readouterr() == ("", "")


def run_python(code: str, *args, **env):
    """A child of its own session with the repository on its path."""
    command = [sys.executable, "-c", code, *map(str, args)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | env
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


EIGHT_DEVICES = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from infinite_jax.checkpoint import Checkpointer
from sharding.mesh import build
def on(data, fsdp, tensor, spec):
    mesh = build((data, fsdp, 1, tensor))
    return {"a": {"w": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=NamedSharding(mesh, spec))}}
folder, expected = sys.argv[1], np.arange(128, dtype=np.float32).reshape(16, 8)
first = on(1, 8, 1, P("fsdp", None))
checkpointer = Checkpointer(folder, 5, 0)
asked = on(2, 1, 4, P("tensor", "data"))
for step in (1, 2):
    got, state = checkpointer.restore(asked)
    assert got == step and state["a"]["w"].sharding == asked["a"]["w"].sharding
    assert {shard.data.shape for shard in state["a"]["w"].addressable_shards} == {(4, 4)}
    np.testing.assert_array_equal(state["a"]["w"], expected * step)
    sharded = jax.device_put(expected * 2, first["a"]["w"].sharding)
    if step == 1:
        checkpointer.save(2, {"a": {"w": sharded}}, None)
checkpointer.close()
"""


def test_restore_onto_another_mesh(tmp_path):
    """One device -> 8, and fsdp=8 -> data=2 x tensor=4."""
    with Checkpointer(tmp_path, 5, 0) as checkpointer:
        checkpointer.save(1, {"a": {"w": jnp.arange(128.0).reshape(16, 8)}}, None)
    child = run_python(EIGHT_DEVICES, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert child.communicate(timeout=120) == ("", "") and child.returncode == 0


# Imports once, then forks a saver at every line it reads: JAX has not started, so the fork is safe.
SAVER = """
import os, sys
import jax, jax.numpy as jnp
from infinite_jax.checkpoint import Checkpointer
def save_on_and_on(folder, first):
    checkpointer = Checkpointer(folder, 2, 1)
    for step in range(first, 10_000):
        checkpointer.save(step, {"a": {"w": jnp.full((256, 256), step)}, "b": jnp.int32(step)}, (step % 7) / 7)
print("ready", flush=True)
for line in sys.stdin:
    if (child := os.fork()) == 0:
        save_on_and_on(sys.argv[1], int(line))
    print(child, flush=True)
    os.waitpid(child, 0)
"""


def test_killed_at_any_moment(tmp_path):
    """kill -9 while saving: what is restored is a complete step, not older than what was verified at the last look."""
    command = [sys.executable, "-c", SAVER, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    asked = {"a": {"w": jnp.zeros((256, 256), jnp.int32)}, "b": jnp.int32(0)}
    step, rng = 0, random.Random(0)
    with subprocess.Popen(command, env=environment, bufsize=1, **pipes) as parent:
        assert parent.stdout.readline() == "ready\n"
        for _ in range(6):
            parent.stdin.write(f"{step + 1}\n")
            child = int(parent.stdout.readline())
            deadline = time.monotonic() + 30
            while max(Checkpointer(tmp_path, 2, 1).steps(), default=0) < step + 3 and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
            before, (step, state) = step, wait_and_restore(tmp_path, asked)
            assert step >= before + 2
            assert (np.asarray(state["a"]["w"]) == step).all() and int(state["b"]) == step
        parent.stdin.close()


def wait_and_restore(folder, asked):
    time.sleep(0.05)  # the killed process is gone when its open files are
    return Checkpointer(folder, 2, 1).restore(asked)


def test_steps_to_keep_outlive_newer_ones_until_they_are_no_longer_named(tmp_path):
    with Checkpointer(tmp_path, 1, 0) as checkpointer:
        for step, keep in ((0, ()), (2, (0, 0)), (4, (0, 0)), (6, (0, 6)), (8, (6, 6))):
            checkpointer.save(step, small(step), None, keep)
            checkpointer.wait()
            assert checkpointer.steps() == sorted({step, *keep}), step
        assert checkpointer.restore(abstract(small(0)), 6)[0] == 6


def test_a_retreat_moves_newer_steps_aside_and_nothing_else(tmp_path):
    saved(tmp_path, (1, 2, 3, 4)).retreat(2)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "3.superseded", "4.superseded"}
    again = Checkpointer(tmp_path, 10, 0)
    again.retreat(2)  # as after a kill
    assert again.steps() == [1, 2] and again.restore(abstract(small(0)))[0] == 2
    with Checkpointer(tmp_path, 10, 0, after=2) as checkpointer:
        checkpointer.save(3, small(30), None)
    assert saved(tmp_path, ()).restore(abstract(small(0)))[1]["b"] == 30
