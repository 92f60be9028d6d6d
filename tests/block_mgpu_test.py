"""Hopper's kernels: the table of tiles, that they lower for CUDA, and what they compute, interpreted and on a GPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_xla_test import reference, relative
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import topology
from kernels import block_mgpu
from kernels import block_mgpu_tiles as tiles
from kernels.block import MASKED, Mask

GPU = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU: JAX_PLATFORMS=cuda pytest -m slow")
INTERPRETER = pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="needs the interpreter of jax 0.11")
SCALE = 0.1


def masks(B, T, S):
    """name: mask, what it shows [B, T, S]. T = S for those that are causal."""
    rng = np.random.default_rng(0)
    i32 = lambda x: jnp.asarray(x, jnp.int32)  # noqa: E731
    t, s = np.arange(T)[:, None], np.arange(S)
    lengths = np.array([0, S * 2 // 3, S])[:B]
    short = s < lengths[:, None, None]
    segments = np.sort(rng.integers(0, 4, (B, S)), 1)
    same = segments[:, :T, None] == segments[:, None]
    place = rng.permuted(np.tile(np.arange(S), (B, 1)), axis=1)
    distance = place[:, :T, None] - place[:, None]
    straight = np.tile(s, (B, 1))
    found = {
        "none": (Mask(), np.ones((B, T, S), bool)),
        "lengths": (Mask(lengths_B=i32(lengths)), short),
        "segments": (Mask(segments=(i32(segments[:, :T]), i32(segments))), same),
        "positions": (Mask(positions=(i32(place[:, :T]), i32(place))), distance >= 0),
        "window": (
            Mask(positions=(i32(straight[:, :T]), i32(straight)), window=i32(S // 3)),
            (t >= s) & (t - s < S // 3),
        ),
    }
    if T == S:
        found["causal"] = Mask(causal=True), t >= s
        found["packed"] = Mask(causal=True, segments=(i32(segments), i32(segments))), (t >= s) & same
        found["all"] = (
            Mask(False, i32(lengths), (i32(segments), i32(segments)), (i32(place), i32(place)), i32(S // 2)),
            short & same & (distance >= 0) & (distance < S // 2),
        )
    return {name: (mask, np.broadcast_to(seen, (B, T, S))) for name, (mask, seen) in found.items()}


@pytest.mark.parametrize("name", ["none", "causal", "lengths", "packed", "window", "all"])
def test_table_visits_what_a_mask_shows_and_tests_what_it_must(name):
    """Against the mask itself, tile by tile; where ids rise along the row, nothing is visited in vain."""
    B, T, q_tile, k_tile = 3, 50, 8, 4
    mask, seen = masks(B, T, T)[name]
    pad = np.pad(seen, ((0, 0), (0, -T % q_tile), (0, -T % k_tile)))  # padding shows nothing
    pad = pad.reshape(B, -1, q_tile, pad.shape[2] // k_tile, k_tile)
    some, every = pad.any((2, 4)), pad.all((2, 4))
    every[:, -1] = True  # its last queries are padding, which may see anything
    every[:, :, -1] &= T % k_tile == 0
    for outer_keys in (False, True):
        table = np.asarray(tiles.table(mask, T, T, q_tile, k_tile, outer_keys))
        if outer_keys:
            some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
        table, inner = np.broadcast_to(table, (B, *table.shape[1:])), np.arange(some.shape[2])
        first, whole, ragged, stop = (table[..., column, None] for column in range(4))
        assert np.all((first <= whole) & (whole <= ragged) & (ragged <= stop))
        visited, untested = (first <= inner) & (inner < stop), (whole <= inner) & (inner < ragged)
        assert not np.any(some & ~visited) and not np.any(untested & ~every)
        if name in ("none", "causal", "lengths", "window"):
            assert np.array_equal(visited, some)


def test_a_head_dimension_or_dtype_without_a_kernel_is_refused_in_one_line():
    x = jnp.zeros((1, 128, 2, 80), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"head dimension 80: it has \[64, 128\]; set model.attention=xla$"):
        block_mgpu.BLOCK.forward(x, x, x, Mask(), 1.0)
    x = jnp.zeros((1, 128, 2, 64), jnp.float32)
    with pytest.raises(ValueError, match="in float32, float32, float32: set model"):
        block_mgpu.BLOCK.forward(x, x, x, Mask(), 1.0)


def both(block, q, k, v, do, mask):
    o, lse = block.forward(q, k, v, mask, SCALE)
    delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    return o, lse, *block.backward(q, k, v, o, lse, delta, do, mask, SCALE)


def shapes(B, T, S, H, K, D):
    return (B, T, H, D), (B, S, K, D), (B, S, K, D), (B, T, H, D)


def test_lowers_for_cuda_without_a_gpu():
    """To three Mosaic GPU kernels. Warpgroups, copies and layouts are checked on the way; machine code is not made."""
    given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes(1, 256, 256, 2, 1, 128)]

    def run(*x):
        return both(block_mgpu.BLOCK, *x, Mask(causal=True))

    text = jax.jit(run).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 3


def compare(block, name, B, T, S, H, K, D, tolerance=6e-3):
    """Against float64 from the same bfloat16 inputs."""
    mask, seen = masks(B, T, S)[name]
    rng = np.random.default_rng(1)
    given = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes(B, T, S, H, K, D)]
    # interpreted, kernel by kernel: two at once may wait for each other's threads
    run = both if block.name == "interpreted" else jax.jit(both, static_argnums=0)
    found = run(block, *given, mask)
    q, k, v, do = given
    *expected, ((dk, dv),) = reference(q, do, [(k, v, seen)], SCALE)
    unseen = ~seen.any(2)
    assert np.all(np.asarray(found[1]).swapaxes(1, 2)[unseen] == np.float32(MASKED))
    assert not np.any(np.asarray(found[0], np.float32)[unseen])
    for ours, theirs in zip(found, (*expected, dk, dv)):
        assert np.all(np.isfinite(np.asarray(ours, np.float32)))
        assert relative(ours, theirs) <= tolerance, name


@pytest.fixture
def interpreted(monkeypatch):
    """The block on a CPU. Products with registers on the left, which the interpreter lacks, are done plainly."""

    def dot(a, b):
        return jnp.dot(a, b[...], preferred_element_type=jnp.float32)

    monkeypatch.setattr(tiles, "accumulate", lambda sums, a, b: sums + dot(a, b))
    monkeypatch.setattr(
        tiles, "accumulate_two", lambda sums, a, b, others, make, d: (sums + dot(a, b), others + dot(make(), d))
    )
    monkeypatch.setitem(tiles.SIZES, 64, tiles.Sizes(64, 2, 64, 64, 2))  # so that buffers are used again
    return block_mgpu.make_block(interpret=plgpu.InterpretGPUParams())._replace(name="interpreted")


@INTERPRETER
@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "lengths", "packed", "window", "all"])
def test_interpreted_on_a_cpu_against_float64(interpreted, name):
    keys = {"lengths": 200, "window": 200}.get(name, 256)
    compare(interpreted, name, 2, 130 if keys == 200 else 256, keys, 2, 1, 64)


@GPU
@pytest.mark.slow
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("name", ["none", "causal", "lengths", "segments", "packed", "positions", "window", "all"])
def test_on_a_gpu_against_float64(name, D):
    compare(block_mgpu.BLOCK, name, 3, 640, 640, 6, 2, D)


@GPU
@pytest.mark.slow
@pytest.mark.parametrize("name", ["lengths", "segments", "window"])
def test_on_a_gpu_with_ragged_lengths(name):
    compare(block_mgpu.BLOCK, name, 2, 300, 1000, 8, 1, 128)


@pytest.mark.slow
@pytest.mark.parametrize("D", [64, 128])
def test_compiles_for_an_h100_without_one(D, tmp_path, monkeypatch):
    """To machine code for sm_90a: wgmma is not serialised, and registers hold what they must but for a few bytes."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs jax's CUDA plugin: see benchmarks/topology.py")
    for name, value in {"PTX": "1", "PTXAS": "1", "TO": str(tmp_path)}.items():
        monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{name}", value)
    mesh = Mesh(np.array(topology.devices("H100:1")[0]), ("x",))
    place = NamedSharding(mesh, PartitionSpec())
    given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes(1, 512, 512, 4, 2, D)]
    run = jax.jit(lambda *x: both(block_mgpu.BLOCK, *x, Mask(causal=True)))
    run.lower(*given).compile()
    said = {file.name: file.read_text() for file in tmp_path.glob("*.ptxas")}
    assert len(said) == 3
    for name, text in said.items():
        assert "serialized" not in text and "ignored" not in text, name
        assert int(re.search(r"(\d+) bytes spill stores", text).group(1)) <= 128, name
