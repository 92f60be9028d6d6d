"""Attention on one GPU: this project's blocks beside torch's SDPA and jax's own cuDNN attention, in one run.

    python -m benchmarks.kernels [--lengths 2k,4k,8k,16k,32k] [--tokens 32k] [--blocks cudnn,mgpu,xla] [--out FILE]

bfloat16, causal, heads 9 of 3 keys at head dimension 64 and 16 of 8 at 128; as many rows as make --tokens tokens.
Blocks run as training runs them, through ring_attention with one device. TFLOP/s count 4 T^2 / 2 operations a head and
element of it forward, 2.5 times that backward; of packed rows (segments of random length) the pairs within segments.
Times are of --layers layers of attention one after another, each with its own keys and values, in one program (torch:
one autograd graph), over their number: as in a model, and with 1 as calls on their own, the way into them included.
Errors are against dense float32 attention at --small tokens. torch runs first, in a child process, on its own inputs.
--sweep times mgpu with other tiles instead.
"""

import functools
import itertools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import arguments, attempt, normal, numbers, relative, report, seconds_of_each
from kernels import select
from kernels.block import Block, Mask
from kernels.ring_attention import Part, ring_attention

HEADS = {64: (9, 3), 128: (16, 8)}
SIZES = {"lengths": "2k,4k,8k,16k,32k", "tokens": "32k", "small": 1024, "blocks": "cudnn,mgpu,xla", "xla-most": "8k"}
SIZES |= {"layers": 4}
TINY = {"lengths": "128,256", "tokens": "256", "small": 128, "blocks": "xla"}
COLUMNS = ["rows", "D", "T", "attention", "fwd TFLOP/s", "fwd+bwd TFLOP/s", "fwd ms", "fwd+bwd ms"]
COLUMNS += ["error o", "dq", "dk", "dv", "not run"]


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


def time_each(attentions: dict, head_dim: int, length: int, rows: int, repeats: int, packed: bool, layers: int):
    """Of each by name: TFLOP/s forward, forward and backward; milliseconds of both, a layer. Or why there are none."""
    given, pairs = inputs(rows, length, head_dim, packed, layers)
    runs, why_not = {}, {}
    for name, attend in attentions.items():
        ways = [functools.partial(way, *given) for way in both_ways(functools.partial(attend, head_dim**-0.5))]
        _, why = attempt(lambda: jax.block_until_ready([way() for way in ways]))  # noqa: B023
        if why:
            why_not[name] = why
        else:
            runs |= {(name, way): run for way, run in enumerate(ways)}
    times = seconds_of_each(runs, repeats)
    flops = 4 * pairs * HEADS[head_dim][0] * head_dim
    found = {}
    for name in attentions.keys() - why_not:
        both = [times[name, way] / layers for way in (0, 1)]
        found[name] = [flops * share / t / 1e12 for share, t in zip((1, 3.5), both)] + [1e3 * t for t in both]
    return found, why_not


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
        found[f"this project, {name}"] = functools.partial(ours, select.block(name))
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


def torch_rows(cases, repeats: int, small: int, layers: int) -> list[list]:
    """Of benchmarks/kernels_torch.py, in a process of its own: two frameworks share no memory pool."""
    command = [sys.executable, "-m", "benchmarks.kernels_torch", json.dumps([cases, repeats, small, layers])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return [["whole", None, None, "torch SDPA", *[None] * 8, done.stderr.strip().splitlines()[-1][:160]]]
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    def also(parser):
        parser.add_argument("--no-torch", action="store_true")
        parser.add_argument("--no-packed", action="store_true")
        parser.add_argument("--sweep", action="store_true", help="times mgpu with other tiles, and nothing else")

    given = arguments("benchmarks.kernels", __doc__, SIZES, TINY, also)
    tokens = numbers(given.tokens)[0]
    cases = [(D, T, max(1, tokens // T)) for D, T in itertools.product(HEADS, numbers(given.lengths))]
    rows = []
    if not (given.no_torch or given.sweep):
        rows = torch_rows([(*case, HEADS[case[0]]) for case in cases], 5, given.small, given.layers)
    for row in rows:
        print(row, flush=True)
    found = sweep_contenders() if given.sweep else contenders(given.blocks.split(","))
    for packed, D in itertools.product((False, True)[: 2 - given.no_packed], HEADS):
        kind = "packed" if packed else "whole"
        wrong = {name: attempt(lambda a=a, D=D, p=packed: errors(a, D, given.small, p)) for name, a in found.items()}
        print(f"D {D}, {kind}: errors {wrong}", flush=True)
        right = {name: attend for name, attend in found.items() if wrong[name][0]}
        rows += [[kind, D, None, name, *[None] * 8, why] for name, (error, why) in wrong.items() if not error]
        for _, T, number in [case for case in cases if case[0] == D]:
            timed = {
                name: a for name, a in right.items() if not name.endswith("xla") or numbers(given.xla_most)[0] >= T
            }
            speeds, why_not = time_each(timed, D, T, number, given.repeats, packed, given.layers)
            for name in timed:
                row = [kind, D, T, name, *speeds.get(name, [None] * 4), *wrong[name][0], why_not.get(name)]
                rows.append(row)
                print(row, flush=True)
    rows.sort(key=lambda row: (row[0] != "whole", row[1] or 0, row[2] or 0))
    report(given, {}, COLUMNS, [row for row in rows if row[4] is not None or row[-1]])


if __name__ == "__main__":
    main()
