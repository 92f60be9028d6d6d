"""Attention on one GPU: this project's blocks beside torch's SDPA and jax's own cuDNN attention, in one run.

    python -m benchmarks.kernels [--lengths 2k,4k,8k,16k,32k] [--tokens 32k] [--blocks cudnn,mgpu,xla] [--out FILE]

bfloat16, causal, heads 9 of 3 keys at head dimension 64 and 16 of 8 at 128; as many rows as make --tokens tokens.
Blocks run as training runs them, through ring_attention with one device. TFLOP/s count 4 T^2 / 2 operations a head and
element of it forward, 2.5 times that backward; of packed rows (segments of random length) the pairs within segments.
Times are of --layers layers of attention one after another, each with its own keys and values, in one program (torch:
one autograd graph), over their number: as in a model, and with 1 as calls on their own, the way into them included.
Errors are against dense float32 attention at --small tokens (torch's: float64). --sweep times mgpu with other tiles.

All are timed in turns, case by case and round by round, so that the GPU is as warm for one as for another. torch runs
in a child process, on inputs of its own, and both processes hold GPU memory at once: jax takes its share at the start,
and XLA_PYTHON_CLIENT_MEM_FRACTION=.5 leaves torch the other half.
"""

import contextlib
import functools
import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import arguments, attempt, enough, in_turns, normal, numbers, relative, report, timer
from kernels import select
from kernels.block import Block, Mask
from kernels.ring_attention import Part, ring_attention

HEADS = {64: (9, 3), 128: (16, 8)}
SIZES = {"lengths": "2k,4k,8k,16k,32k", "tokens": "32k", "small": 1024, "blocks": "cudnn,mgpu,xla", "xla-most": "8k"}
SIZES |= {"layers": 4}
TINY = {"lengths": "128,256", "tokens": "256", "small": 128, "blocks": "xla"}
COLUMNS = ["rows", "D", "T", "attention", "fwd TFLOP/s", "fwd+bwd TFLOP/s", "fwd ms", "fwd+bwd ms", "over the best"]
COLUMNS += ["error o", "dq", "dk", "dv", "not run"]
OURS = "this project"
LEAST = 0.2  # seconds a timing lasts


class Contender(NamedTuple):
    errors: Callable[[int, int, bool], list[float]]  # of head_dim, small, packed
    timers: Callable[[int, tuple], list[Callable[[], float]]]  # of head_dim, inputs: forward, forward and backward


def ours(block: Block, scale: float, q, k, v, segments):
    pair = None if segments is None else (segments, segments)
    return ring_attention(q, (Part(k, v, Mask(causal=True, segments=pair)),), scale=scale, block=block)


def jax_cudnn(scale: float, q, k, v, segments):
    if segments is not None:
        raise NotImplementedError("no packed rows in jax.nn.dot_product_attention")
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")


def dense(scale: float, q, k, v, segments):
    """The reference: float32, every score at once."""
    group = q.shape[2] // k.shape[2]
    q, k, v = q.astype(jnp.float32), *(jnp.repeat(x.astype(jnp.float32), group, 2) for x in (k, v))
    dot = functools.partial(jnp.einsum, precision="highest")
    seen = jnp.tri(q.shape[1], dtype=bool)
    if segments is not None:
        seen &= (segments[:, :, None] == segments[:, None])[:, None]
    s = jnp.where(seen, scale * dot("bthd,bshd->bhts", q, k), -jnp.inf)
    return dot("bhts,bshd->bthd", jax.nn.softmax(s, axis=-1), v)


def both_ways(attend):
    """(forward, forward and backward) as compiled functions of q, do, segments and the (k, v) of each layer."""

    def forward(q, segments, layers):
        for k, v in layers:
            q = attend(q, k, v, segments)
        return q

    def backward(q, do, segments, layers):
        o, pull = jax.vjp(lambda q, layers: forward(q, segments, layers), q, layers)
        return o, *pull(do.astype(o.dtype))

    return jax.jit(lambda q, do, segments, layers: forward(q, segments, layers)), jax.jit(backward)


def inputs(rows: int, length: int, head_dim: int, packed: bool, layers: int):
    """(q, do, segments or None, (k, v) of each layer), and the pairs of query and key of all rows that count."""
    H, K = HEADS[head_dim]
    shapes = [(rows, length, heads, head_dim) for heads in (H, H, *[K] * 2 * layers)]
    q, do, *kv = normal(length + head_dim, jnp.bfloat16, *shapes)
    segments, pairs = None, rows * length * length / 2
    if packed:
        rng = np.random.default_rng(length)
        cuts = rng.random((rows, length)) < 16 / length  # 16 segments a row on average
        segments = np.cumsum(cuts, 1)
        sizes = [np.bincount(row) for row in segments]
        pairs = float(sum((size.astype(float) ** 2).sum() for size in sizes) / 2)
        segments = jnp.asarray(segments, jnp.int32)
    return (q, do, segments, tuple(zip(kv[::2], kv[1::2]))), pairs


def errors(attend, head_dim: int, small: int, packed: bool) -> list[float]:
    (q, do, segments, layers), _ = inputs(2, small, head_dim, packed, 1)
    scale, exact = head_dim**-0.5, jax.tree.map(lambda x: x.astype(jnp.float32), (q, do, layers))
    found = both_ways(functools.partial(attend, scale))[1](q, do, segments, layers)
    expected = both_ways(functools.partial(dense, scale))[1](*exact[:2], segments, exact[2])
    return [relative(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected))]


def timers(attend, head_dim: int, given) -> list[Callable[[], float]]:
    """What times forward once, and what forward and backward."""

    def warm(run):
        timed = timer(run, LEAST)

        def time_once() -> float:
            jax.block_until_ready(run())  # untimed: the GPU has to come back from the other process
            return timed()

        return time_once

    return [warm(functools.partial(way, *given)) for way in both_ways(functools.partial(attend, head_dim**-0.5))]


def contenders(names: list[str]) -> dict:
    """name: attention, of the named blocks that this machine has, and jax's own."""
    device, found = jax.devices()[0], {}
    for name in names:
        try:
            where = (device.platform, device.device_kind)
            select.choose(name, *where, head_dim=64, dtype=jnp.bfloat16, windows=False, packed=False)
        except ValueError as error:
            print(error)
            continue
        found[f"{OURS}, {name}"] = functools.partial(ours, select.block(name))
    return found | {"jax.nn cudnn": jax_cudnn}


def sweep_contenders() -> dict:
    """mgpu with each of some sizes of tiles."""
    from kernels import block_mgpu_backward, block_mgpu_forward, block_mgpu_tiles

    def sized(sizes) -> Block:
        def forward(q, k, v, mask, scale):
            return block_mgpu_forward.forward(q, k, v, mask, scale, sizes)

        def backward(q, k, v, o, lse, delta, do, mask, scale):
            return block_mgpu_backward.backward(q, k, v, lse, delta, do.astype(q.dtype), mask, scale, sizes)

        return Block(f"mgpu {tuple(sizes)}", forward, backward)

    tiles = [
        block_mgpu_tiles.Sizes(keys, stages, keys_dq, queries, behind)
        for (keys, stages), (keys_dq, queries, behind) in zip(
            ((128, 2), (128, 3), (64, 4), (64, 3), (192, 2), (256, 2)),
            ((64, 64, 2), (64, 64, 3), (128, 64, 2), (64, 128, 2), (96, 64, 2), (128, 128, 2)),
        )
    ]
    return {f"mgpu {tuple(sizes)}": functools.partial(ours, sized(sizes)) for sizes in tiles}


class Torch:
    """benchmarks/kernels_torch.py, which runs in a process of its own: two frameworks share no memory pool."""

    def __init__(self, tiny: bool):
        if importlib.util.find_spec("torch") is None:
            raise ModuleNotFoundError("torch is not installed: pip install torch")
        command = [sys.executable, "-m", "benchmarks.kernels_torch", *["--tiny"] * tiny]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.names = self.ask("names")

    def ask(self, what: str, *arguments):
        """The result of one request. RuntimeError: why there is none."""
        with contextlib.suppress(BrokenPipeError):  # it has ended, and the empty line below says so
            print(json.dumps([what, *arguments]), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"benchmarks.kernels_torch ended, {self.process.wait()}: see what it printed")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def errors(self, name: str, head_dim: int, small: int, packed: bool) -> list[float]:
        return self.ask("errors", name, HEADS[head_dim], small, head_dim)

    def timers(self, name: str, head_dim: int, given) -> list[Callable[[], float]]:
        q, *_, layers = given
        self.ask("prepare", name, q.shape[0], HEADS[head_dim], q.shape[1], head_dim, len(layers))
        calls = [enough(self.ask("time", name, way, 1), LEAST) for way in (0, 1)]
        return [functools.partial(self.ask, "time", name, way, number) for way, number in enumerate(calls)]


def time_each(found: dict[str, Contender], torch: Torch | None, length: int, head_dim: int, packed: bool, of):
    """Of each by name: TFLOP/s forward, forward and backward; milliseconds of both, a layer. Or why there are none.

    of: the command line. torch: whose memory is given back, or None.
    """
    given, pairs = inputs(max(1, numbers(of.tokens)[0] // length), length, head_dim, packed, of.layers)
    made = {name: attempt(functools.partial(one.timers, head_dim, given)) for name, one in found.items()}
    why_not = {name: why for name, (_, why) in made.items() if why}
    ready = {name: both for name, (both, why) in made.items() if not why}
    ways = [{name: both[way] for name, both in ready.items()} for way in (0, 1)]
    times, why = attempt(lambda: [in_turns(way, of.repeats) for way in ways])
    if torch:
        attempt(lambda: torch.ask("forget"))
    if why:
        return {}, why_not | dict.fromkeys(ready, why)
    flops, speeds = 4 * pairs * HEADS[head_dim][0] * head_dim, {}
    for name in ready:
        both = [way[name] / of.layers for way in times]
        speeds[name] = [flops * share / t / 1e12 for share, t in zip((1, 3.5), both)] + [1e3 * t for t in both]
    return speeds, why_not


def over_the_best(speeds: dict[str, list[float]]) -> dict[str, float]:
    """Of each of this project's: its speed forward and backward, over the best of torch and jax.nn."""
    ours = {name: speed[1] for name, speed in speeds.items() if name.startswith(OURS)}
    best = max((speed[1] for name, speed in speeds.items() if name not in ours), default=None)
    return {name: speed / best for name, speed in ours.items()} if best else {}


def rows_of(found: dict[str, Contender], torch: Torch | None, head_dim: int, packed: bool, of) -> list[list]:
    """Of all lengths. of, torch: as of time_each."""
    kind = "packed" if packed else "whole"
    wrong = {name: attempt(functools.partial(one.errors, head_dim, of.small, packed)) for name, one in found.items()}
    print(f"D {head_dim}, {kind}: errors {wrong}", flush=True)
    right = {name: one for name, one in found.items() if wrong[name][0]}
    rows = [[kind, head_dim, None, name, *[None] * 9, why] for name, (error, why) in wrong.items() if not error]
    for T in numbers(of.lengths):
        timed = {name: one for name, one in right.items() if not name.endswith("xla") or numbers(of.xla_most)[0] >= T}
        speeds, why_not = time_each(timed, torch, T, head_dim, packed, of)
        over = over_the_best(speeds)
        for name in timed:
            speed = speeds.get(name, [None] * 4)
            rows.append([kind, head_dim, T, name, *speed, over.get(name), *wrong[name][0], why_not.get(name)])
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    def also(parser):
        parser.add_argument("--no-torch", action="store_true")
        parser.add_argument("--no-packed", action="store_true")
        parser.add_argument("--sweep", action="store_true", help="times mgpu with other tiles, and nothing else")

    given = arguments("benchmarks.kernels", __doc__, SIZES, TINY, also)
    rows, torch, why = [], None, None
    if not (given.no_torch or given.sweep):
        torch, why = attempt(lambda: Torch(given.tiny))
        rows += [["whole", None, None, "torch SDPA", *[None] * 9, why]] if why else []
    of_jax = sweep_contenders() if given.sweep else contenders(given.blocks.split(","))
    bind, names = functools.partial, torch.names if torch else []
    found = {name: Contender(bind(errors, attend), bind(timers, attend)) for name, attend in of_jax.items()}
    theirs = {name: Contender(bind(torch.errors, name), bind(torch.timers, name)) for name in names}
    for packed, D in itertools.product((False, True)[: 2 - given.no_packed], HEADS):
        # of torch there are whole rows only
        rows += rows_of(found, None, D, True, given) if packed else rows_of(theirs | found, torch, D, False, given)
    rows.sort(key=lambda row: (row[0] != "whole", row[1] or 0, row[2] or 0))
    report(given, {}, COLUMNS, [row for row in rows if row[4] is not None or row[-1]])


if __name__ == "__main__":
    main()
