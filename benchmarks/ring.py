"""Ring attention, forward and backward, on any number of devices, beside all-gathering keys and one device's own work.

    python -m benchmarks.ring [--tokens 32k,64k,128k,256k] [--block auto] [--devices 0] [--out FILE]
    python -m benchmarks.ring --topology H200:2      compiles for GPUs that are not there: memory only

bfloat16, causal, one row of --tokens tokens in zigzag order over the devices. TFLOP/s a device count 3.5 x 4 T^2 / 2
operations a head and element of it; temporaries are the compiler's own count. One device alone has a whole row of
T / sqrt(devices) tokens, the same number of operations; `each alone, at once` is that on every device at the same time,
and shows what the slowest of them and the host they share leave to reach. `all-gather`: every device gathers all keys
and values, and each of its two chunks attends to the keys before it and, causally, to its own.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import topology
from benchmarks.kernels import dense
from benchmarks.measure import arguments, attempt, in_turns, normal, numbers, relative, report, timer
from kernels import select, zigzag
from kernels.block import Block, Mask
from kernels.ring_attention import Part, ring_attention

SIZES = {"tokens": "32k,64k,128k,256k", "heads": 16, "kv-heads": 8, "head-dim": 128, "small": 1024, "block": "auto"}
TINY = {"tokens": "256,512", "heads": 4, "kv-heads": 2, "head-dim": 16, "small": 64}
COLUMNS = ["tokens", "devices", "attention", "ms", "TFLOP/s a device", "of one device", "temporaries MiB"]
COLUMNS += ["keys and values MiB", "error o", "dq", "dk", "dv", "not run"]
SPLIT = PartitionSpec(None, "seq")
LEAST = 0.2  # seconds of one timing


def ring(block: Block, scale: float, q, k, v):
    return ring_attention(q, (Part(k, v, Mask(causal=True)),), scale=scale, block=block, axis="seq")


def gathered(block: Block, scale: float, q, k, v):
    """The same from local chunks lo and hi, keys and values gathered whole and in their order."""
    me, n, rows, chunk = jax.lax.axis_index("seq"), jax.lax.axis_size("seq"), len(q), q.shape[1] // 2
    back = zigzag.inverse(2 * n, n)

    def whole(x):
        x = jax.lax.all_gather(x, "seq", axis=1, tiled=True)
        return x.reshape(rows, 2 * n, chunk, *x.shape[2:])[:, back].reshape(x.shape)

    every_k, every_v = whole(k), whole(v)
    found = []
    for number, own in enumerate(zip(*(jnp.split(x, 2, 1) for x in (q, k, v)))):
        before = (2 * n - 1 - me if number else me) * chunk
        earlier = Part(every_k, every_v, Mask(lengths_B=jnp.full(rows, before, jnp.int32)))
        parts = (earlier, Part(*own[1:], Mask(causal=True)))
        found.append(ring_attention(own[0], parts, scale=scale, block=block))
    return jnp.concatenate(found, 1)


def alone(block: Block, scale: float, q, k, v):
    return ring_attention(q, (Part(k, v, Mask(causal=True)),), scale=scale, block=block)


def gradients(attend, q, k, v, do):
    o, pull = jax.vjp(attend, q, k, v)
    return o, *pull(do)


def program(attend, mesh: Mesh, shapes):
    """Forward and backward, compiled for rows split over the mesh's `seq`."""
    run = functools.partial(gradients, attend)
    split = jax.shard_map(run, mesh=mesh, in_specs=(SPLIT,) * 4, out_specs=(SPLIT,) * 4, check_vma=False)
    place = NamedSharding(mesh, SPLIT)
    return (
        jax.jit(split).lower(*(jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes)).compile()
    )


def shapes_of(given, length: int):
    return [(1, length, heads, given.head_dim) for heads in (given.heads, given.kv_heads, given.kv_heads, given.heads)]


def errors(given, attend, mesh: Mesh) -> list[float]:
    """Against dense float32 attention on one device."""
    length, n = zigzag.padded(given.small, mesh.size), mesh.size
    arrays, order, back = (
        normal(0, jnp.bfloat16, *shapes_of(given, length)),
        *(f(length, n) for f in (zigzag.order, zigzag.inverse)),
    )
    placed = [jax.device_put(x[:, order], NamedSharding(mesh, SPLIT)) for x in arrays]
    found = program(attend, mesh, shapes_of(given, length))(*placed)
    expected = jax.jit(functools.partial(gradients, lambda *x: dense(given.head_dim**-0.5, *x, None)))(
        *(x.astype(jnp.float32) for x in arrays)
    )
    return [relative(np.asarray(jax.device_get(a))[:, back], b) for a, b in zip(found, expected)]


class Case(NamedTuple):
    """One attention at one number of tokens."""

    label: str
    attend: Callable
    mesh: Mesh
    length: int  # of the rows that are split over the mesh, together
    pairs: float  # of query and key, a device
    kept: float  # MiB of keys and values, a device


def cases(given, block: Block, tokens: int, many: Mesh, one: Mesh) -> list[Case]:
    attends = [functools.partial(attend, block, given.head_dim**-0.5) for attend in (alone, ring, gathered)]
    own = math.ceil(tokens / math.sqrt(many.size) / 256) * 256  # a row of as many operations as a device's share
    width = 2 * 2 * given.kv_heads * given.head_dim / 2**20
    pairs, share = tokens * tokens / 2 / many.size, tokens / many.size
    return [
        Case(f"one device alone, {block.name}", attends[0], one, own, own * own / 2, width * own),
        Case(f"each alone, at once, {block.name}", attends[0], many, own * many.size, own * own / 2, width * own),
        Case(f"ring, {block.name}", attends[1], many, tokens, pairs, width * share),
        Case(f"all-gather, {block.name}", attends[2], many, tokens, pairs, width * tokens),
    ]


def prepare(given, case: Case, run: bool):
    """(MiB of temporaries, a timer or None where nothing can run)."""
    shapes = shapes_of(given, case.length)
    compiled = program(case.attend, case.mesh, shapes)
    temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**20
    if not run:
        return temporaries, None
    place = NamedSharding(case.mesh, SPLIT)
    arrays = jax.jit(lambda: normal(0, jnp.bfloat16, *shapes), out_shardings=[place] * 4)()
    return temporaries, timer(lambda: compiled(*arrays), 0.0 if given.tiny else LEAST)


def time_all(given, found: list[Case], wrong: dict, run: bool) -> list[list]:
    """The rows of the table for one number of tokens, timed in turns."""
    ready = {case.label: attempt(lambda c=case: prepare(given, c, run)) for case in found}
    timers = {label: made[1] for label, (made, _) in ready.items() if made and made[1]}
    times, rows, bar = in_turns(timers, given.repeats), [], None
    for case in found:
        made, why = ready[case.label]
        took = times.get(case.label)
        speed = 3.5 * 4 * case.pairs * given.heads * given.head_dim / took / 1e12 if took else None
        bar = speed if case is found[0] else bar
        errors_of, why_wrong = wrong.get(case.label, (None, None))
        row = [case.length, case.mesh.size, case.label, took and 1e3 * took, speed, speed and bar and speed / bar]
        row += [made and made[0], case.kept, *(errors_of or [None] * 4), why or why_wrong]
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    def also(parser):
        parser.add_argument("--devices", type=int, default=0, help="the first so many; 0 = all")
        parser.add_argument("--topology", default="", help="compile for H100:n or H200:n instead of running here")

    given = arguments("benchmarks.ring", __doc__, SIZES, TINY, also)
    devices = topology.devices(given.topology)[0] if given.topology else jax.devices()
    devices = devices[: given.devices or None]
    many, one = (Mesh(np.array(chosen), ("seq",)) for chosen in (devices, devices[:1]))
    platform = "gpu" if given.topology else devices[0].platform
    needs = {"head_dim": given.head_dim, "dtype": jnp.bfloat16, "windows": False, "packed": False}
    block = select.block(select.choose(given.block, platform, devices[0].device_kind, **needs))
    run, rows, wrong = not given.topology, [], {}
    for case in cases(given, block, numbers(given.tokens)[0], many, one):
        if run and (case.mesh is one or case.attend.func is not alone):
            wrong[case.label] = attempt(lambda c=case: errors(given, c.attend, c.mesh))
    print("errors", wrong, flush=True)
    for tokens in numbers(given.tokens):
        rows += time_all(given, cases(given, block, tokens, many, one), wrong, run)
    report(given, {"kernel": block.name}, COLUMNS, rows)


if __name__ == "__main__":
    main()
