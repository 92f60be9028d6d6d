"""Attention around a ring of fake CPU devices, and on one, against dense attention in numpy float64.

pytest runs on one device, so the rings live in a child process (this file run as a script).
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_xla_test import reference, relative
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from kernels import block_xla, zigzag
from kernels.block import MASKED, Block, Mask
from kernels.ring_attention import Part, ring_attention

FAST = {"xla_backend_optimization_level": 0}  # to compile
ROOT = Path(__file__).resolve().parent.parent
HEADS = {
    "gqa3": (6, 2, 64),
    "gqa1": (2, 2, 64),
    "gqa2_d128": (4, 2, 128),
    "gqa4_d256": (4, 1, 256),
    "gqa8": (16, 2, 64),
}
WINDOWS = {"window": 9, "window_2": 2, "window_chunk": 6, "window_chunk_1": 7, "window_all": 96, "window_off": 0}

# (case, heads, devices, dtype)
DEFAULT = [("causal", "gqa3", n, dtype) for n in (1, 2, 4) for dtype in ("float32", "bfloat16")]
DEFAULT += [("ragged", "gqa3", 4, "float32")]
DEFAULT += [(case, "gqa3", 2, "float32") for case in ("shared", "window", "padded")]
SLOW = [(case, "gqa3", n, "float32") for case in ("causal", "ragged", "shared", "window", "padded") for n in (3, 8)]
SLOW += [(case, "gqa3", 4, "bfloat16") for case in ("ragged", "shared", "window")]
SLOW += [("causal", heads, 2, dtype) for heads in HEADS for dtype in ("float32", "bfloat16")]
SLOW += [("ragged", heads, 2, "float32") for heads in HEADS]
SLOW += [(window, "gqa3", 4, "float32") for window in WINDOWS]
SLOW += [("nothing", "gqa3", 4, "float32")]


def example(case, heads, n, dtype):
    """q, do, [(k, v, mask, what it shows)]: 4 rows of 48 tokens, or 45, a length that the ring does not divide."""
    H, K, D = HEADS[heads]
    T, S, rng = 45 if case in ("ragged", "shared") else 48, 40, np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    tokens, prompt = np.arange(T)[None].repeat(4, 0), np.arange(S)[None].repeat(2, 0)
    causal = np.tri(T, dtype=bool)[None].repeat(4, 0)
    q, do = normal(4, T, H, D), normal(4, T, H, D)
    own, shared = (normal(4, T, K, D), normal(4, T, K, D)), (normal(2, S, K, D), normal(2, S, K, D))
    lengths = np.array([29, 0])  # of two prompts, two rows each
    short = (prompt < lengths[:, None]).repeat(2, 0)[:, None].repeat(T, 1)
    if case == "causal":
        parts = [(*own, Mask(True), causal)]
    elif case == "padded":  # on the right
        own_lengths = np.array([48, 29, 3, 0])
        parts = [(*own, Mask(True, own_lengths), causal & (tokens < own_lengths[:, None])[:, None])]
    elif case == "ragged":  # packed rows of unlike segments; an id comes back later in the row
        ids = np.stack([np.repeat(x, np.diff([0, *ends, T])) for x, ends in (
            ((0, 1, 2), (1, 30)), ((0, 1, 0, 3), (11, 12, 40)), ((5,), ()), ((2, 1), (24,)),
        )])  # fmt: skip
        parts = [(*own, Mask(True, segments=(ids, ids)), causal & (ids[:, :, None] == ids[:, None]))]
    elif case == "shared":
        parts = [(*shared, Mask(lengths_B=lengths), short), (*own, Mask(True), causal)]
    elif case == "nothing":  # the rows of the second prompt see no key at all
        parts = [(*shared, Mask(lengths_B=lengths), short)]
    else:
        places = lengths.repeat(2)[:, None] + tokens
        before, distance = places[:, :, None] - prompt.repeat(2, 0)[:, None], places[:, :, None] - places[:, None]
        within = lambda x: (x >= 0) & ((x < WINDOWS[case]) | (WINDOWS[case] == 0))  # noqa: E731
        window = jnp.int32(WINDOWS[case])
        parts = [
            (*shared, Mask(lengths_B=lengths, positions=(places, prompt), window=window), short & within(before)),
            (*own, Mask(positions=(places, places), window=window), within(distance)),
        ]
    return q, do, parts


def around(n, q, do, parts, block=block_xla.BLOCK):
    """o, dq and (dk, dv) of each part, from the ring, in the rows' own order. Padding is garbage without a gradient."""

    def laid(x, fill=9):
        length = zigzag.padded(x.shape[1], n)
        full = jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        return full[:, zigzag.order(length, n)]

    def back(x, like):
        return x[:, zigzag.inverse(x.shape[1], n)][:, : like.shape[1]]

    def laid_mask(mask):
        laid_pair = lambda pair: pair and tuple(laid(jnp.asarray(x), 10**6) for x in pair)  # noqa: E731
        lengths = None if mask.lengths_B is None else jnp.asarray(mask.lengths_B)
        return Mask(mask.causal, lengths, laid_pair(mask.segments), laid_pair(mask.positions), mask.window)

    laid_parts = tuple(Part(laid(k), laid(v), laid_mask(mask)) for k, v, mask, _ in parts)
    mesh = jax.make_mesh((n,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:n])
    rows = PartitionSpec(None, "seq")
    specs = jax.tree.map(lambda x: rows if x.ndim > 1 else PartitionSpec(), laid_parts)
    attend = jax.shard_map(
        functools.partial(ring_attention, scale=q.shape[-1] ** -0.5, block=block, axis="seq"),
        mesh=mesh, in_specs=(rows, specs), out_specs=rows, check_vma=False,
    )  # fmt: skip

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(q, do, parts):
        o, vjp = jax.vjp(lambda q, kv: attend(q, join(kv, parts)), q, [part[:2] for part in parts])
        return o, *vjp(do)

    o, dq, d_parts = run(laid(q), laid(do, 0), laid_parts)
    return (
        back(o, q),
        back(dq, q),
        [[back(x, like) for x, like in zip(pair, part)] for pair, part in zip(d_parts, parts)],
    )


def join(kv, parts):
    return tuple(Part(k, v, part.mask) for (k, v), part in zip(kv, parts))


@functools.partial(jax.jit, compiler_options=FAST)
def dense(q, do, parts):
    """The same by jax's own differentiation of dense attention, in the arrays' dtype."""

    def attend(q, kv):
        spread = lambda x: x.repeat(len(q) // len(x), 0).repeat(q.shape[2] // x.shape[2], 2)  # noqa: E731
        k, v = (jnp.concatenate([spread(pair[which]) for pair in kv], 1) for which in (0, 1))
        seen = jnp.concatenate([part[3] for part in parts], -1)[:, None]
        s = q.shape[-1] ** -0.5 * jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
        p = jax.nn.softmax(jnp.where(seen, s, MASKED)).astype(q.dtype)
        return jnp.einsum("bhts,bshd->bthd", p, v)

    o, vjp = jax.vjp(attend, q, [part[:2] for part in parts])
    return o, *vjp(do)


def named(o, dq, d_parts) -> dict:
    return {"o": o, "dq": dq} | {f"d{x}{i}": d for i, pair in enumerate(d_parts) for x, d in zip("kv", pair)}


def measure(chosen) -> dict[str, dict[str, list[float]]]:
    """Per case and array: relative error in L2, that of dense attention in the same dtype, whether all is finite."""
    report = {}
    for case, heads, n, dtype in chosen:
        q, do, parts = example(case, heads, n, dtype)
        o, _, dq, d_parts = reference(q, do, [(k, v, seen) for k, v, _, seen in parts], q.shape[-1] ** -0.5)
        right, found = named(o, dq, d_parts), named(*around(n, q, do, parts))
        usual = named(*dense(q, do, parts)) if dtype == "bfloat16" else found
        assert all(str(x.dtype) == dtype for x in found.values())
        errors = {x: [relative(found[x], right[x]), relative(usual[x], right[x])] for x in right}
        report["-".join(map(str, (case, heads, n, dtype)))] = errors
    return report


def in_child(*arguments) -> dict:
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, __file__, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def default() -> dict:
    return in_child("default")


@pytest.fixture(scope="module")
def slow() -> dict:
    return in_child("slow")


def check(report, case):
    for name, (error, usual) in report["-".join(map(str, case))].items():
        limit = 2e-6 if case[3] == "float32" else min(1e-2, 1.5 * usual)
        assert error < limit, (name, error, limit)


@pytest.mark.parametrize("case", DEFAULT, ids=lambda x: "-".join(map(str, x)))
def test_equals_dense_attention(default, case):
    check(default, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=lambda x: "-".join(map(str, x)))
def test_more_rings_equal_dense_attention(slow, case):
    check(slow, case)


@functools.partial(jax.jit, compiler_options=FAST)
def on_one(q, do, parts):
    attend = functools.partial(ring_attention, scale=q.shape[-1] ** -0.5, block=block_xla.BLOCK)
    o, vjp = jax.vjp(lambda q, kv: attend(q, join(kv, parts)), q, [part[:2] for part in parts])
    return o, *vjp(do)


def test_without_a_mesh_it_is_flash_attention_over_all_parts():
    q, do, parts = example("shared", "gqa3", 1, "float32")
    o, _, dq, d_parts = reference(q, do, [(k, v, seen) for k, v, _, seen in parts], q.shape[-1] ** -0.5)
    found = named(*on_one(q, do, [Part(*part[:3]) for part in parts]))
    assert all(relative(found[name], x) < 2e-6 for name, x in named(o, dq, d_parts).items())


def test_steps_are_one_call_each_alike_on_all_devices_and_in_sum_causal_work():
    calls = []

    def forward(q, k, v, mask, scale):
        calls.append((q.shape[:2], k.shape[:2], mask))
        return block_xla.forward(q, k, v, mask, scale)

    def backward(q, k, v, o, lse, delta, do, mask, scale):
        calls.append((q.shape[:2], k.shape[:2], mask))
        assert o.shape == do.shape == q.shape and lse.shape == delta.shape == (len(q), 6, q.shape[1])
        return block_xla.backward(q, k, v, o, lse, delta, do, mask, scale)

    q, kv = (jax.ShapeDtypeStruct((1, 64, heads, 8), jnp.float32) for heads in (6, 2))
    spec = PartitionSpec(None, "seq")
    attend = jax.shard_map(
        lambda q, k, v: ring_attention(
            q, (Part(k, v, Mask(True)),), scale=0.2, block=Block("counts", forward, backward), axis="seq"
        ),
        mesh=AbstractMesh((4,), ("seq",), (AxisType.Auto,)), in_specs=spec, out_specs=spec, check_vma=False,
    )  # fmt: skip
    traced = jax.jit(lambda q, k, v: jax.vjp(attend, q, k, v)[1](q)).trace(q, kv, kv)
    steps = 3 * [((1, 16), (1, 8), Mask()), ((1, 8), (1, 16), Mask())]  # the two branches
    assert calls[:7] == [((1, 16), (1, 16), Mask(True)), *steps]
    assert calls[7:] == [((2, 8), (2, 8), Mask(True)), *steps, ((1, 8), (1, 8), Mask())]
    # of 16 x 16 local scores: one half, then three times 16 x 8 = one half, together a quarter of 64 x 64 / 2
    text = str(traced.jaxpr)
    # forward: keys and values, 3 steps. backward: the same; their gradients, 3 steps and home
    assert text.count("ppermute[") == 3 + 3 + 4 and text.count("optimization_barrier") == 3 + 3 + 1
    assert "all_gather" not in text


def test_named_residuals_spare_the_second_forward_pass():
    q, do, parts = example("causal", "gqa3", 1, "float32")
    k, v, mask, _ = parts[0]

    def products(policy):
        attend = jax.checkpoint(
            lambda q, k, v: ring_attention(q, (Part(k, v, mask),), scale=0.2, block=block_xla.BLOCK), policy=policy
        )
        return str(jax.make_jaxpr(lambda *x: jax.vjp(attend, *x)[1](do))(q, k, v)).count("dot_general[")

    keep = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    assert products(keep) == 2 + 5 and products(None) == 2 + 2 + 5


@pytest.mark.parametrize(
    "mask, shapes, message",
    [
        (Mask(True), {"k": (2, 5, 2, 8)}, "needs as many keys as queries"),
        (Mask(True), {"k": (1, 6, 2, 8)}, "needs as many keys as queries"),
        (Mask(), {"k": (3, 6, 2, 8)}, "do not fit keys"),
        (Mask(), {"k": (2, 6, 3, 8)}, "do not fit keys"),
        (Mask(), {"v": (2, 6, 2, 4)}, "do not fit keys"),
        (Mask(True, positions=(0, 0)), {}, "drop causal"),
        (Mask(window=4), {}, "needs positions"),
    ],
)
def test_contradictions_are_refused(mask, shapes, message):
    shapes = {"q": (2, 6, 4, 8), "k": (2, 6, 2, 8)} | shapes
    q, k, v = (jnp.zeros(shapes.get(name, shapes["k"])) for name in "qkv")
    with pytest.raises(ValueError, match=message) as error:
        ring_attention(q, (Part(k, v, mask),), scale=0.2, block=block_xla.BLOCK)
    assert "\n" not in str(error.value)


if __name__ == "__main__":
    print(json.dumps(measure({"default": DEFAULT, "slow": SLOW}[sys.argv[1]])))
