"""An experiment: cuDNN's own packed layout and sliding window, which kernels/block_cudnn.py leaves out.

    python -m benchmarks.packed [--lengths 4k,16k] [--window 1024] [--out FILE]

Asks, on one GPU from Hopper on: are o, lse and the gradients right, given the lse of the whole row as a block is, and
what do they cost beside whole causal rows and beside mgpu on the same mask. The packed layout takes the lengths and the
offsets of M segments a row and returns the lse of each segment in a [H, T] plane of its own; `planes` and `tokens` go
back and forth. Nothing of training depends on this file.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels import HEADS, both_ways
from benchmarks.measure import arguments, attempt, normal, numbers, relative, report, seconds
from kernels import block_cudnn, block_mgpu
from kernels.block import Block, Mask
from kernels.ring_attention import Part, ring_attention

COLUMNS = ["mask", "T", "attention", "error o", "dq", "dk", "dv", "fwd ms", "fwd+bwd ms", "fwd+bwd TFLOP/s", "not run"]
ROWS, SEGMENTS = 2, 16  # of a row at most


def segment_ids(length: int) -> np.ndarray:
    """i32 [ROWS, length], each row of SEGMENTS or, the second, fewer segments."""
    rng = np.random.default_rng(0)
    cuts = np.zeros((ROWS, length), bool)
    for row, count in enumerate((SEGMENTS, SEGMENTS // 2)):
        cuts[row, rng.choice(np.arange(1, length), count - 1, replace=False)] = True
    return np.cumsum(cuts, 1).astype(np.int32)


class Layout:
    """Lengths [B, M] and offsets [B, M + 1] of the segments, -1 behind the last, and where each token's lse lies."""

    def __init__(self, segments: np.ndarray):
        rows, length = segments.shape
        self.lengths = np.full((rows, SEGMENTS), -1, np.int32)
        self.offsets = np.full((rows, SEGMENTS + 1), -1, np.int32)
        for row in range(rows):
            sizes = np.bincount(segments[row])
            self.lengths[row, : len(sizes)] = sizes
            self.offsets[row, : len(sizes) + 1] = np.concatenate([[0], np.cumsum(sizes)])
        before = np.concatenate([[0], np.cumsum(segments.max(1) + 1)[:-1]])
        self.plane = segments + before[:, None]  # of each token, counted over all rows
        self.place = np.arange(length) - np.take_along_axis(self.offsets, segments, 1)

    def tokens(self, stats: jax.Array) -> jax.Array:
        """[B x M, H, T] -> [B, H, T]"""
        return jnp.moveaxis(stats[self.plane, :, self.place], 2, 1)

    def planes(self, lse: jax.Array) -> jax.Array:
        rows, heads, length = lse.shape
        empty = jnp.zeros((rows * SEGMENTS, heads, length), jnp.float32)
        return empty.at[self.plane, :, self.place].set(jnp.moveaxis(lse, 1, 2))


def packed_block(segments: np.ndarray) -> Block:
    from jax._src.cudnn import fused_attention_stablehlo as module

    private, layout = block_cudnn.private(), Layout(segments)

    def operands(q, k):
        lengths, offsets = jnp.asarray(layout.lengths), jnp.asarray(layout.offsets)
        fixed = module._fix_seqlen_offsets(lengths, lengths, offsets, offsets, q, k)
        absent = jnp.zeros(0, q.dtype)
        return absent, *fixed, absent, absent

    def static(scale):
        return block_cudnn._static(private, Mask(causal=True, lengths_B=0), scale)

    def forward(q, k, v, mask, scale):
        o, stats = private.forward.bind(q, k, v, *operands(q, k), **static(scale), is_training=True)
        return o, layout.tokens(stats)

    def backward(q, k, v, o, lse, delta, do, mask, scale):
        arrays = (*operands(q, k), layout.planes(lse), o.astype(q.dtype), do.astype(q.dtype))
        return private.backward.bind(q, k, v, *arrays, **static(scale))

    return Block("cudnn packed", forward, backward)


def window_block(window: int) -> Block:
    private = block_cudnn.private()

    def static(scale):
        return block_cudnn._static(private, Mask(causal=True), scale) | {"sliding_window_length": window}

    def operands(q):
        return [jnp.zeros(0, q.dtype)] * 7

    def forward(q, k, v, mask, scale):
        return private.forward.bind(q, k, v, *operands(q), **static(scale), is_training=True)

    def backward(q, k, v, o, lse, delta, do, mask, scale):
        arrays = (*operands(q), lse, o.astype(q.dtype), do.astype(q.dtype))
        return private.backward.bind(q, k, v, *arrays, **static(scale))

    return Block("cudnn window", forward, backward)


def cases(length: int, window: int):
    """(mask's name, attention's name, block, mask, what is seen [B, T, T] or [T, T] as a function)."""
    segments, t = segment_ids(length), np.arange(length)
    ids, places = jnp.asarray(segments), jnp.asarray(np.tile(t, (ROWS, 1)), jnp.int32)
    tri = lambda: np.tri(length, dtype=bool)  # noqa: E731
    same = lambda: tri() & (segments[:, :, None] == segments[:, None])  # noqa: E731
    near = lambda: tri() & (t[:, None] - t < window)  # noqa: E731
    yield "causal", "cudnn", lambda: block_cudnn.BLOCK, Mask(causal=True), tri
    yield "packed", "cudnn packed", lambda: packed_block(segments), Mask(causal=True, segments=(ids, ids)), same
    yield "packed", "mgpu", lambda: block_mgpu.BLOCK, Mask(causal=True, segments=(ids, ids)), same
    place = Mask(positions=(places, places), window=jnp.int32(window))
    yield f"window {window}", "cudnn window", lambda: window_block(window), place, near
    yield f"window {window}", "mgpu", lambda: block_mgpu.BLOCK, place, near


def attend(block: Block, mask: Mask, scale: float, q, k, v, _):
    return ring_attention(q, (Part(k, v, mask),), scale=scale, block=block)


def dense(seen, scale: float, q, k, v, _):
    q, k, v = q.astype(jnp.float32), *(jnp.repeat(x.astype(jnp.float32), q.shape[2] // k.shape[2], 2) for x in (k, v))
    s = scale * jnp.einsum("bthd,bshd->bhts", q, k, precision="highest")
    s = jnp.where(seen if seen.ndim == 2 else seen[:, None], s, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(s, axis=-1), v, precision="highest")


def measure(make_block, mask, seen, length: int, small: bool, repeats: int):
    """Four errors if the length is small, else None; milliseconds, TFLOP/s."""
    D, (H, K) = 128, HEADS[128]
    q, k, v, do = normal(0, jnp.bfloat16, *((ROWS, length, heads, D) for heads in (H, K, K, H)))
    given = q, do, None, ((k, v),)
    run, run_both = both_ways(functools.partial(attend, make_block(), mask, D**-0.5))
    wrong = [None] * 4
    if small:
        expected = both_ways(functools.partial(dense, jnp.asarray(seen()), D**-0.5))[1](*given)
        wrong = [relative(a, b) for a, b in zip(jax.tree.leaves(run_both(*given)), jax.tree.leaves(expected))]
    times = [seconds(lambda f=f: f(*given), repeats) for f in (run, run_both)]
    pairs = float(np.broadcast_to(seen(), (ROWS, length, length)).sum())
    return [*wrong, *(1e3 * x for x in times), 3.5 * 4 * pairs * H * D / times[1] / 1e12]


def main() -> None:
    tiny = {"lengths": "128", "window": 50}
    given = arguments("benchmarks.packed", __doc__, {"lengths": "1k,4k,16k", "window": 1024}, tiny)
    rows = []
    for length in numbers(given.lengths):
        for mask_name, name, make_block, mask, seen in cases(length, min(given.window, length // 2)):
            run = functools.partial(measure, make_block, mask, seen, length, length <= 2048, given.repeats)
            found, why = attempt(run)
            rows.append([mask_name, length, name, *(found or [None] * 7), why])
            print(rows[-1], flush=True)
    report(given, {}, COLUMNS, rows)


if __name__ == "__main__":
    main()
