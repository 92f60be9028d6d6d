"""What the Hopper kernels of a block share: tile sizes, which tiles a mask shows, the mask inside a tile, products.

Before a kernel starts, the smallest and largest index, segment and position of each tile of queries and of keys say
which inner tiles each of its outer tiles needs. They form a table with a row of integers an outer tile:

    first <= whole <= ragged <= stop     inner tiles [first, stop) are visited, those in [whole, ragged) without a mask

It is exact for causal, padded, packed and sliding-window rows; ids in an order that is not monotone only cost time.
Queries and keys are padded to whole tiles: padded queries have no effect, their gradient being zero; padded keys are
hidden by causality or counted out by the table's limit.

The kernels are written for warpgroups: 128 threads hold a [64, N] tile of scores or of an accumulator in registers.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.block import Mask

WARPGROUPS = 2  # that compute, each with its own rows of the outer tile; one more fetches
ROWS = 64  # of a warpgroup's tile: what one wgmma instruction computes
OUTER = WARPGROUPS * ROWS  # queries (forward, dq) or keys (dk and dv) of one program
COMPUTE_REGISTERS, FETCH_REGISTERS = 240, 24  # a thread: 2 x 240 + 24 are the 3 x 168 that three warpgroups begin with
LOG2E = math.log2(math.e)
FIRST, WHOLE, RAGGED, STOP, LIMIT, WINDOW = range(6)  # columns of the table
UNBOUNDED = 2**30
COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # one number a column of a tile, as the layout of registers
LINES = plgpu.Layout.WGMMA.reduce(1)  # one number a row
WHOLE_REF = ((),) if jax.__version_info__ < (0, 11) else ()  # plgpu.load's index of all of a reference


class Sizes(NamedTuple):
    """Tiles in shared memory. Static."""

    keys: int  # of a tile, forward
    stages: int  # tiles of keys and values at once, forward
    keys_dq: int  # of a tile, in dq's sum over keys
    queries_dkv: int  # of a tile, in the sum of dk and dv over queries
    stages_backward: int


SIZES = {64: Sizes(128, 4, 128, 64, 4), 128: Sizes(128, 2, 64, 64, 3)}  # by head dimension


class Rule(NamedTuple):
    """Which tests a score must pass. Static."""

    causal: bool
    limited: bool  # by the number of keys that count
    segments: bool
    positions: bool

    @property
    def ids(self) -> int:
        """Arrays of integers that come with each tile of queries and of keys."""
        return self.segments + self.positions


class Ids(NamedTuple):
    """Segments, then positions, as far as the mask has them, padded to whole tiles."""

    q: list[jax.Array]  # i32 [B, T]
    k: list[jax.Array]  # i32 [B, S]


def rule(mask: Mask, keys: int, key_tile: int) -> Rule:
    """keys: S before it is padded to whole tiles."""
    limited = mask.lengths_B is not None or (keys % key_tile > 0 and not mask.causal)
    return Rule(mask.causal, limited, mask.segments is not None, mask.positions is not None)


def padded(x: jax.Array, tile: int, axis: int, mode: str = "constant") -> jax.Array:
    """x with whole tiles along `axis`, of zeros or (mode "edge") of its last element."""
    missing = -x.shape[axis] % tile
    width = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, width, mode=mode) if missing else x


def ids(mask: Mask, q_tile: int, k_tile: int) -> Ids:
    present = [pair for pair in (mask.segments, mask.positions) if pair is not None]
    q = [padded(q.astype(jnp.int32), q_tile, 1, "edge") for q, _ in present]
    return Ids(q, [padded(k.astype(jnp.int32), k_tile, 1, "edge") for _, k in present])


def table(mask: Mask, q_len: int, k_len: int, q_tile: int, k_tile: int, outer_keys: bool = False) -> jax.Array:
    """The table of this module's docstring, i32 [B or 1, outer tiles, 6]; q_len and k_len before padding."""
    q_low, k_low = q_tile * jnp.arange(-(-q_len // q_tile))[:, None], k_tile * jnp.arange(-(-k_len // k_tile))
    some = every = jnp.ones((1, len(q_low), len(k_low)), bool)  # does any, do all scores of a tile pass the tests
    if mask.causal:
        some, every = some & (q_low + q_tile > k_low), every & (q_low + 1 >= k_low + k_tile)
    limit_B = jnp.full(1, k_len) if mask.lengths_B is None else jnp.minimum(mask.lengths_B, k_len)
    if mask.lengths_B is not None or not mask.causal:
        limit = limit_B[:, None, None]
        some, every = some & (k_low < limit), every & (k_low + k_tile <= limit)
    window = jnp.int32(UNBOUNDED) if mask.window is None else jnp.where(mask.window > 0, mask.window, UNBOUNDED)
    if mask.segments is not None:
        least, most = _differences(mask.segments, q_tile, k_tile)
        some, every = some & (least <= 0) & (most >= 0), every & (least == 0) & (most == 0)
    if mask.positions is not None:
        least, most = _differences(mask.positions, q_tile, k_tile)
        some, every = some & (most >= 0) & (least < window), every & (least >= 0) & (most < window)
    if outer_keys:
        some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
    spans = _spans(some, every)
    limit = jnp.broadcast_to(limit_B[:, None, None], (len(some), some.shape[1], 1))
    return jnp.concatenate([spans, limit, jnp.full_like(limit, window)], 2).astype(jnp.int32)


def _differences(pair, q_tile: int, k_tile: int) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest q - k between a tile of queries and one of keys, each [B, q tiles, k tiles]."""
    q, k = (padded(x.astype(jnp.int32), tile, 1, "edge") for x, tile in zip(pair, (q_tile, k_tile)))
    q, k = (x.reshape(len(x), -1, tile) for x, tile in zip((q, k), (q_tile, k_tile)))
    return q.min(-1)[:, :, None] - k.max(-1)[:, None], q.max(-1)[:, :, None] - k.min(-1)[:, None]


def _spans(some: jax.Array, every: jax.Array) -> jax.Array:
    """(first, whole, ragged, stop) of each outer tile, [B, outer, 4]: the hull of `some`, the first run of `every`."""
    inner = jnp.arange(some.shape[2])
    end = some.shape[2]
    stop = jnp.where(some, inner + 1, 0).max(2)
    first = jnp.minimum(jnp.where(some, inner, end).min(2), stop)
    whole = jnp.minimum(jnp.where(every, inner, end).min(2), stop)
    ragged = jnp.where(~every & (inner > whole[..., None]), inner, stop[..., None]).min(2)
    return jnp.stack([first, whole, jnp.maximum(ragged, whole), stop], 2)


def seen(rule: Rule, shape: tuple[int, int], q_axis: int, q_low, k_low, row, q_ids, k_ids) -> jax.Array:
    """Which scores of a tile a mask shows, bool `shape`, queries along `q_axis`.

    q_low, k_low: the tile's first query and key. row: the table's scalars. q_ids, k_ids: registers, LINES or COLUMNS.
    """
    q, k = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (q_axis, 1 - q_axis))
    tests = []
    if rule.causal:
        tests.append(q + (q_low - k_low) >= k)
    if rule.limited:
        tests.append(k < row[LIMIT] - k_low)
    spread = [
        (lax.broadcast_in_dim(a, shape, [q_axis]), lax.broadcast_in_dim(b, shape, [1 - q_axis]))
        for a, b in zip(q_ids, k_ids)
    ]
    if rule.segments:
        a, b = spread.pop(0)
        tests.append(a == b)
    if rule.positions:
        a, b = spread.pop(0)
        tests += [a >= b, a - b < row[WINDOW]]
    return functools.reduce(jnp.logical_and, tests)


def span(table_ref, row, tile) -> list[jax.Array]:
    """The scalars of an outer tile, indexed by FIRST to WINDOW."""
    row = row if table_ref.shape[0] > 1 else 0
    return [table_ref[row, tile, column] for column in range(table_ref.shape[2])]


def split(rule: Rule, refs: tuple) -> tuple[tuple[tuple, tuple], tuple]:
    """((ids of queries, ids of keys), the rest) of a program's references."""
    return (refs[: rule.ids], refs[rule.ids : 2 * rule.ids]), refs[2 * rule.ids :]


def visit_all(rule: Rule, span, visit, state):
    """visit(step, state, masked) over the inner tiles of a span in their order; step counts from its first."""
    whole, ragged, stop = (span[column] - span[FIRST] for column in (WHOLE, RAGGED, STOP))
    plain = functools.partial(visit, masked=False)
    if not any(rule):
        return lax.fori_loop(0, stop, plain, state)
    state = lax.fori_loop(0, whole, functools.partial(visit, masked=True), state)
    state = lax.fori_loop(whole, ragged, plain, state)
    return lax.fori_loop(ragged, stop, functools.partial(visit, masked=True), state)


def fetch_all(steps, stages: int, copies, there, free) -> None:
    """What the third warpgroup does: keeps `stages` buffers filled with the tiles of `steps`, then waits for the last.

    copies(step): the pairs (source, buffers) of a step, all of which arrive at its barrier in `there`.
    """
    plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")

    @pl.loop(0, steps)
    def _(step):
        at = lax.rem(step, jnp.int32(stages))
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[at]))
        for source, buffers in copies(step):
            plgpu.copy_gmem_to_smem(source, buffers.at[at], there.at[at])

    @pl.loop(0, jnp.minimum(steps, stages))
    def _(at):
        plgpu.barrier_wait(free.at[at])


def spread(line: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    """A number a row (axis 0) or a column (axis 1), over a tile."""
    return lax.broadcast_in_dim(line, shape, [axis])


def load(ref, layout) -> jax.Array:
    """All of a vector in shared memory, into registers."""
    return plgpu.load(ref, *WHOLE_REF, layout=layout)


def transposed(ref):
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def product(a, b, meanwhile=None) -> jax.Array:
    """a @ b in float32. a [64, K]: shared memory or registers; b [K, N]: shared memory.

    meanwhile: called while the tensor cores are at work.
    """

    def body(sums):
        plgpu.wgmma(sums, a, b)
        if meanwhile is not None:
            meanwhile()
        return sums[...]

    return pl.run_scoped(body, plgpu.ACC((ROWS, b.shape[1]), jnp.float32))


def two_products(a, b, c, d, use) -> tuple[jax.Array, jax.Array]:
    """use(a @ b) and c @ d; the tensor cores compute the second while `use` is at the first."""

    def body(first, second):
        plgpu.wgmma(first, a, b)
        plgpu.wgmma(second, c, d)
        used = use(plgpu.wgmma_accumulator_load(first, wait_n=1))
        return used, second[...]

    sums = (plgpu.ACC((ROWS, x.shape[1]), jnp.float32) for x in (b, d))
    return pl.run_scoped(body, *sums)


def accumulate(sums: jax.Array, a, b) -> jax.Array:
    """sums + a @ b in float32, as `product`."""
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(sums))


def accumulate_two(sums: jax.Array, a, b, others: jax.Array, make, d) -> tuple[jax.Array, jax.Array]:
    """sums + a @ b and others + make() @ d; the tensor cores compute the first while `make` is called."""

    def body(refs):
        first, second = refs
        plgpu.wgmma(first, a, b)
        plgpu.wgmma(second, make(), d)

    return pl.run_state(body)((plgpu.ACC.init(sums), plgpu.ACC.init(others)))


def constant(shape: tuple[int, ...], value: float) -> jax.Array:
    """float32 registers: a tile [64, N], or a number a row [64]."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else LINES
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def matrix(*shape: int, dtype) -> plgpu.SMEM:
    """Shared memory for matrices that wgmma reads: rows of 128 bytes, swizzled so that no two share a bank."""
    width = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128)))
