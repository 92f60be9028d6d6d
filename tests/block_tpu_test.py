"""The TPU kernels, interpreted, against dense attention in numpy float64; compiled for real chips by libtpu (slow).

Rings and the TPU compiler need processes of their own (this file run as a script). Interpreted tiles are of 128 tokens,
so that short rows have several.
"""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ring_attention_test as ring
from block_xla_test import reference, relative
from jax.experimental.pallas import tpu as pltpu

from infinite_jax.planning import counts
from kernels import block_tpu_mask, block_tpu_tiles, zigzag
from kernels.block import MASKED, Mask
from kernels.block_tpu import BLOCK, make_block
from kernels.block_tpu_tiles import Tiles, choose_tiles, problem, vmem_bytes
from kernels.ring_attention import Part, ring_attention

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
B, T, S = 2, 500, 300  # 4 and 3 tiles, the last ones padded


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(block_tpu_tiles, "TILE", 128)


def random(dtype, *shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def inputs(keys, dtype, heads=(3, 1, 64)):
    """q, k, v, do."""
    H, K, D = heads
    return random(dtype, (B, T, H, D), (B, keys, K, D), (B, keys, K, D), (B, T, H, D))


def block(q, k, v, do, mask, made):
    """o, dq, dk, dv, lse."""
    scale = q.shape[-1] ** -0.5
    o, lse = made.forward(q, k, v, mask, scale)
    delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    return o, *made.backward(q, k, v, o, lse, delta, do, mask, scale), lse


def dense(q, k, v, do, seen):
    """o, dq, dk, dv of dense attention that rounds what it multiplies and returns to bfloat16, and nothing else."""
    scale, group = q.shape[-1] ** -0.5, q.shape[2] // k.shape[2]
    rounded = lambda x: jax.lax.reduce_precision(x.astype(jnp.float32), 8, 7)  # noqa: E731 a cast would be elided
    summed = lambda x: x.reshape(*k.shape[:3], group, -1).sum(3)  # noqa: E731
    q, do = rounded(q), rounded(do)
    k_all, v_all = (rounded(x).repeat(group, 2) for x in (k, v))
    s = jnp.where(seen[:, None], scale * jnp.einsum("bthd,bshd->bhts", q, k_all), MASKED)
    p = jnp.where(seen[:, None], jax.nn.softmax(s), 0)
    o = rounded(jnp.einsum("bhts,bshd->bthd", rounded(p), v_all))
    delta = (o * do).sum(-1).swapaxes(1, 2)[..., None]
    ds = rounded(p * (jnp.einsum("bthd,bshd->bhts", do, v_all) - delta))
    d_keys = jnp.einsum("bhts,bthd->bshd", ds, scale * q), jnp.einsum("bhts,bthd->bshd", rounded(p), do)
    dq = jnp.einsum("bhts,bshd->bthd", ds, scale * k_all)
    return o, rounded(dq), *(rounded(summed(x)) for x in d_keys)


quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
block_quick, dense_quick = quick(block, static_argnames="made"), quick(dense)


def packed(length, seed):
    """Segments of unlike lengths, i32 [B, length]; the last row's come in any order."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(0, 5, (B, length)), axis=1)
    ids[-1] = rng.permutation(5)[ids[-1]]
    return ids.astype(np.int32)


def masks(case, window=0):
    """The mask, number of keys, and what it shows, bool [B, T, keys]."""
    q_at, k_at = np.arange(T)[:, None], np.arange(T)
    lengths = np.array([0, 170], np.int32)
    segments = packed(T, 1), packed(S, 2)
    order = zigzag.order(T, 2)
    places = np.stack([order, order + 7]).astype(np.int32)
    if case == "none":
        return Mask(), S, np.ones((B, T, S), bool)
    if case == "causal":
        return Mask(True), T, np.broadcast_to(q_at >= k_at, (B, T, T))
    if case == "lengths":
        return Mask(lengths_B=lengths), S, np.broadcast_to(k_at[:S] < lengths[:, None, None], (B, T, S))
    if case == "packed":
        same = segments[0][:, :, None] == segments[0][:, None]
        return Mask(True, segments=segments[:1] * 2), T, (q_at >= k_at) & same
    if case == "window":
        distance = places[:, :, None] - places[:, None]
        seen = (distance >= 0) & ((distance < window) | (window == 0))
        return Mask(positions=(places, places), window=jnp.int32(window)), T, seen
    distance = places[:, :, None] - k_at[:S]  # "all": every field but `causal`, other keys than queries
    seen = (distance >= 0) & (distance < 90) & (k_at[:S] < lengths[:, None, None])
    seen &= segments[0][:, :, None] == segments[1][:, None]
    return Mask(False, lengths, segments, (places, np.stack([k_at[:S]] * B).astype(np.int32)), jnp.int32(90)), S, seen


def check(case, dtype="float32", heads=(3, 1, 64), interpret=True, **of_case):
    mask, keys, seen = masks(case, **of_case)
    q, k, v, do = inputs(keys, dtype, heads)
    *found, lse = block_quick(q, k, v, do, mask, make_block(interpret))
    assert all(x.dtype == q.dtype for x in found) and lse.dtype == jnp.float32
    o, lse_right, dq, d_keys = reference(q, do, [(k, v, seen)], q.shape[-1] ** -0.5)
    usual = dense_quick(q, k, v, do, seen) if dtype == "bfloat16" else found
    np.testing.assert_allclose(lse, lse_right, rtol=1e-5 if dtype == "float32" else 1e-3, atol=1e-5)
    empty = ~seen.any(-1)
    assert not np.asarray(found[0])[empty].any() and not np.asarray(found[1])[empty].any()
    for name, x, right, same in zip(("o", "dq", "dk", "dv"), found, (o, dq, *d_keys[0]), usual):
        limit = 2e-6 if dtype == "float32" else min(1e-2, 1.5 * relative(same, right))
        floor = 1e-4 if np.linalg.norm(right) < 1e-9 else 0  # exact zeros: window 1 leaves one key, its gradient none
        assert np.linalg.norm(x - right) < limit * np.linalg.norm(right) + floor, name
    return empty


def test_equals_dense_attention():
    check("causal")


def test_rows_that_see_nothing_are_zero():
    assert check("lengths").sum() == T
    assert check("all").sum() > T + 100


@pytest.mark.parametrize("window", [1, 2, 128, 129, 0])
def test_windows_end_where_they_should(window):
    check("window", window=window)


def test_bfloat16_is_as_good_as_dense_bfloat16():
    check("packed", "bfloat16")


def test_tiles_are_left_out_only_where_nothing_is_seen():
    for case, window in (("causal", 0), ("lengths", 0), ("packed", 0), ("window", 0), ("window", 100), ("all", 0)):
        mask, keys, seen = masks(case, window)
        q, k, *_ = inputs(keys, jnp.float32)
        p = problem(q, k, mask)
        _, of_queries, of_keys = quick(block_tpu_mask.plan, static_argnums=0)(p, mask)
        full = np.zeros((B, *p.padded), bool)
        full[:, :T, :keys] = seen
        full[:, T:] = full[:, T - 1 : T]  # padded queries count for nothing
        if case == "causal":
            full[:] = np.tri(*p.padded)
        tiles = full.reshape(B, p.grid[0], 128, p.grid[1], 128)
        kind, some, every = np.asarray(of_queries.kind)[:, :, 0], tiles.any((2, 4)), tiles.all((2, 4))
        assert (kind[some] > 0).all() and every[kind == 2].all()
        if case in ("causal", "lengths"):
            np.testing.assert_array_equal(kind, some.astype(int) + every)
        np.testing.assert_array_equal(np.asarray(of_keys.kind)[:, :, 0], kind.swapaxes(1, 2))
        for schedule, run in ((of_queries, p.tiles.k_run), (of_keys, p.tiles.q_run)):
            rows = np.asarray(schedule.kind)[:, :, 0]
            for row, first, last in zip(rows.reshape(-1, rows.shape[2]), schedule.first, schedule.last):
                steps = np.flatnonzero(row) // run
                assert (first, last) == ((steps[0], steps[-1]) if len(steps) else (0, 0))


def test_a_window_leaves_out_most_of_a_long_row(monkeypatch):
    monkeypatch.setattr(block_tpu_tiles, "TILE", 512)
    monkeypatch.setattr(block_tpu_tiles, "chip_vmem", lambda: 64 * MIB)
    places = jnp.arange(8192)[None]
    q, k = (jax.ShapeDtypeStruct((1, 8192, heads, 128), jnp.bfloat16) for heads in (8, 1))
    mask = Mask(positions=(places, places), window=jnp.int32(512))
    p = problem(q, k, mask)
    _, schedule, _ = quick(block_tpu_mask.plan, static_argnums=0)(p, mask)
    assert p.tiles == Tiles(512, 512, 1, 1)
    np.testing.assert_array_equal(schedule.first, np.maximum(np.arange(16) - 1, 0))
    np.testing.assert_array_equal(schedule.last, np.arange(16))
    assert int((schedule.kind == block_tpu_mask.SOME).sum()) == 16 + 15 and not (schedule.kind == 2).any()


def test_tiles_fit_the_chip(monkeypatch):
    monkeypatch.setattr(block_tpu_tiles, "TILE", 512)
    bf16 = jnp.bfloat16
    assert choose_tiles(4096, 4096, 128, 4, bf16, 128 * MIB) == Tiles(512, 512, 2, 2)
    assert choose_tiles(4096, 4096, 128, 1, bf16, 64 * MIB) == Tiles(512, 512, 8, 8)
    assert choose_tiles(1280, 2560, 128, 1, bf16, 64 * MIB) == Tiles(256, 512, 5, 5)  # 5 tiles: 8 do not divide them
    assert choose_tiles(4096, 4096, 128, 32, bf16, 64 * MIB) == Tiles(128, 512, 1, 1)
    assert choose_tiles(1, 77, 64, 1, bf16, 64 * MIB) == Tiles(128, 128, 1, 1)
    for T, D, Q, dtype, vmem in ((4096, 128, 8, bf16, 16), (700, 256, 4, jnp.float32, 64), (4000, 64, 9, bf16, 128)):
        tiles = choose_tiles(T, T + 1, D, Q, dtype, vmem * MIB)
        assert vmem_bytes(tiles, D, Q, dtype) <= min(vmem // 2, 16) * MIB
        assert tiles.q % 128 == tiles.k % 128 == 0 < tiles.q and -(-T // tiles.q) % tiles.q_run == 0


def test_cost_estimates_count_what_causality_leaves():
    q, k = (jax.ShapeDtypeStruct((2, 384, heads, 64), jnp.bfloat16) for heads in (6, 2))
    p = problem(q, k, Mask(True))
    cost = p.cost(flops=4, of_queries=2, of_keys=2, over_keys=True)
    scores = 2 * 6 * 384 * 385 // 2
    assert (cost.flops, cost.transcendentals) == (4 * 64 * scores, scores)
    once, again = 2 * 2 * 384 * 6 * 64 * 2 + 2 * 384 * 6 * 8, scores // (3 * 128) * 2 * 64 * 2
    assert cost.bytes_accessed == once + again


def test_lowers_for_a_tpu_without_one():
    mask, keys, _ = masks("all")
    arrays = inputs(keys, jnp.bfloat16, (4, 2, 128))
    run = jax.jit(functools.partial(block, made=BLOCK))
    text = run.trace(*arrays, mask).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.custom_call @tpu_custom_call") == 3


def test_a_block_is_a_static_argument():
    assert make_block(True) is make_block(True) != make_block(False) is BLOCK and BLOCK.name == "tpu"
    assert hash(BLOCK) == hash(make_block(False))


@quick
def attend_on_one(q, do, parts):
    attend = functools.partial(ring_attention, scale=q.shape[-1] ** -0.5, block=make_block(True))
    o, vjp = jax.vjp(lambda q, kv: attend(q, ring.join(kv, parts)), q, [part[:2] for part in parts])
    return o, *vjp(do)


def test_prompt_and_completions_are_two_parts():
    q, do, parts = ring.example("shared", "gqa3", 1, "float32")
    o, _, dq, d_parts = reference(q, do, [(k, v, seen) for k, v, _, seen in parts], q.shape[-1] ** -0.5)
    found = ring.named(*attend_on_one(q, do, [Part(*part[:3]) for part in parts]))
    assert all(relative(found[name], x) < 2e-6 for name, x in ring.named(o, dq, d_parts).items())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [(2, 2, 64), (4, 2, 128), (4, 1, 256), (8, 1, 64), (8, 1, 128)], ids=str)
@pytest.mark.parametrize("case", ["none", "causal", "lengths", "packed", "window", "all"])
def test_more_shapes_equal_dense_attention(case, heads, dtype):
    check(case, dtype, heads, window=90)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["causal", "window", "all"])
def test_no_races_and_nothing_unwritten_is_read(case, capfd):
    """On two cores. Memory starts as NaN, and reads outside an array raise."""
    check(case, interpret=pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, random_seed=4))
    assert "RACE DETECTED" not in capfd.readouterr().out


RINGS = [(case, "gqa3", n, dtype) for case in ("causal", "ragged", "shared", "window")
         for n, dtype in ((2, "float32"), (4, "float32"), (2, "bfloat16"))]  # fmt: skip


@pytest.fixture(scope="module")
def rings() -> dict:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    return child(flags, "rings")


@pytest.mark.slow
@pytest.mark.parametrize("case", RINGS, ids=lambda x: "-".join(map(str, x)))
def test_rings_equal_dense_attention(rings, case):
    ring.check(rings, case)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler: pip install 'jax[tpu]'")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:4x4x4", "v6e:16x16"])
def test_compiles_for_a_real_chip(topology):
    """Forward and backward inside shard_map over rows and heads, and the gradient of a ring."""
    flags = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for name, found in child(flags, topology).items():
        assert found["kernels"] == found["expected_kernels"], name
        assert found["flops"] == pytest.approx(found["expected_flops"], rel=0.02), name
        assert found["hidden"] == found["exchanges"], name  # of the ring: all of them have work to hide behind


def child(flags, *arguments) -> dict:
    environment = os.environ | flags | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def measure_rings() -> dict:
    report = {}
    for case in RINGS:
        q, do, parts = ring.example(*case)
        o, _, dq, d_parts = reference(q, do, [(k, v, seen) for k, v, _, seen in parts], q.shape[-1] ** -0.5)
        right, found = ring.named(o, dq, d_parts), ring.named(*ring.around(case[2], q, do, parts, make_block(True)))
        usual = ring.named(*ring.dense(q, do, parts)) if case[3] == "bfloat16" else found
        report["-".join(map(str, case))] = {
            x: [relative(found[x], right[x]), relative(usual[x], right[x])] for x in right
        }
    return report


def compile_for(topology: str) -> dict:
    """Per program: kernels and operations, found and expected; seconds of compilation and temporary MiB, to be read."""
    from jax.experimental import topologies

    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    ids = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    short, window = jax.ShapeDtypeStruct((1, 1000), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    bf16 = jnp.bfloat16
    report = {}
    for name, mask, shape, dtype in (
        ("causal", Mask(True), (4096, 4096, 4, 1, 128), bf16),
        ("packed", Mask(True, segments=(ids, ids)), (4096, 4096, 3, 1, 64), bf16),
        ("window", Mask(False, lengths, (short, ids), (short, ids), window), (1000, 4096, 4, 1, 256), bf16),
        ("lengths", Mask(lengths_B=lengths), (1000, 4096, 8, 1, 128), bf16),
        ("float32", Mask(True), (4096, 4096, 2, 2, 128), jnp.float32),
    ):
        for both in (False, True):
            report[f"{name} {'forward and backward' if both else 'forward'}"] = compile_block(
                devices, mask, shape, dtype, both
            )
    report["ring"] = compile_ring(devices)
    return report


def compile_block(devices, mask, shape, dtype, both: bool) -> dict:
    """One row and `shape` (T, S, H, K, D) a device; rows over half the devices, heads over pairs."""
    mesh = jax.sharding.Mesh(devices.reshape(-1, 2), ("data", "tensor"))
    T, S, H, K, D = shape
    heads, row = jax.P("data", None, "tensor"), jax.P("data")

    def on_device(q, k, v, do, mask):
        return block(q, k, v, do, mask, BLOCK) if both else BLOCK.forward(q, k, v, mask, D**-0.5)

    def given(shape, dtype, spec):
        shape = tuple(n * (mesh.shape[axis] if axis else 1) for n, axis in zip(shape, (*spec, *[None] * 4)))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    specs = jax.tree.map(lambda x: row if x.ndim else jax.P(), mask)
    statistic = jax.P("data", "tensor")
    out = (heads,) * 4 + (statistic,) if both else (heads, statistic)
    run = jax.shard_map(on_device, mesh=mesh, in_specs=(*[heads] * 4, specs), out_specs=out, check_vma=False)
    arrays = [given((1, length, n, D), dtype, heads) for length, n in ((T, H), (S, K), (S, K), (T, H))]
    masks = jax.tree.map(lambda x, spec: given(x.shape, x.dtype, spec), mask, specs)
    scores = H * (T * (T + 1) // 2 if mask.causal else T * S)
    return compiled(run, (*arrays, masks), 3 if both else 1, scores * D * (4 + 14 * both))


def compile_ring(devices) -> dict:
    """Gradient of causal attention, 131,072 tokens a row, H16 K8 D128, over rings of at most 16 devices."""
    n = min(len(devices), 16)
    mesh = jax.sharding.Mesh(devices.reshape(-1, n), ("data", "seq"))
    T, H, K, D = 131072, 16, 8, 128
    tokens = jax.P("data", "seq")

    def loss(q, k, v):
        part = Part(k, v, Mask(True))
        attend = functools.partial(ring_attention, scale=D**-0.5, block=BLOCK, axis="seq")
        mapped = jax.shard_map(attend, mesh=mesh, in_specs=(tokens, tokens), out_specs=tokens, check_vma=False)
        return mapped(q, (part,)).astype(jnp.float32).sum()

    def given(heads):
        shape = (mesh.shape["data"], T, heads, D)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, tokens))

    chunk = T // n // 2
    scores = H * (chunk * (2 * chunk + 1) + (n - 1) * 2 * chunk * chunk)
    arrays = given(H), given(K), given(K)
    # a kernel forward and two backward; a call for each branch of later steps, and going backward one more at the end
    kernels = (2 * n - 1) + 2 * (2 * n - 1 + 1)
    return compiled(jax.grad(loss, argnums=(0, 1, 2)), arrays, kernels, scores * D * 18)


def compiled(run, arrays, kernels: int, flops: int) -> dict:
    lowered, start = jax.jit(run).lower(*arrays), time.perf_counter()
    program = lowered.compile()
    memory, text = program.memory_analysis(), program.as_text()
    hidden = [each.overlaps for each in counts.count(text, 1).collectives]
    return {
        "kernels": len(re.findall(r"%attention_.* = .*custom-call\(", text)), "expected_kernels": kernels,
        "flops": program.cost_analysis()["flops"], "expected_flops": flops,
        "exchanges": len(hidden), "hidden": sum(hidden),
        "seconds": round(time.perf_counter() - start, 1), "temporary_mib": round(memory.temp_size_in_bytes / MIB, 1),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(measure_rings() if sys.argv[1] == "rings" else compile_for(sys.argv[1])))
