"""Cost of drawing single prompts by priority, beside numpy drawing as many from the same shares.

    python benchmarks/prompt_level.py [--prompts 512] [--streams 12] [--repeats 200] [--sizes 1000 10000 100000]

Prints a table of median milliseconds a call, jitted and warm, the result waited for:

    shares  prompt_level.probabilities: pass rates, staleness and the floor of the unseen, normalised in every stream
    draw    prompt_level.draw: shares, systematic points in every stream, the state that counts them
    update  prompt_level.update from given pass rates
    choice  numpy Generator.choice(N, P, p=p): independent prompts, given the finished shares

Each call of a row takes its turn, so that a busy moment of the machine meets all of them. A third of the prompts has
never been drawn, the others have random pass rates and ages.

A second table says what the priorities do: 2,000 prompts of one domain, 16 at a time, each passed with a probability of
its own, Beta(0.3, 0.3), that nothing changes; the part of groups of 8 whose replies all pass or all fail, and which
teach nothing, in each epoch of draws.
"""

import argparse
import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from curriculum import prompt_level
from curriculum.config import PromptConfig
from curriculum.prompt_level import PromptState

CONFIG = PromptConfig(beta=0.3, low_weight=0.5, uncertainty_weight=2.0, staleness_weight=1.0, unseen=0.5)


def row(size: int, streams: int, num_prompts: int, repeats: int) -> list[float]:
    """Medians in ms: shares, draw, update, choice."""
    rng = np.random.default_rng(0)
    where = jax.tree.map(jnp.asarray, prompt_level.layout([len(part) for part in np.array_split(range(size), streams)]))
    visits_N = rng.integers(0, 3, size)
    state = PromptState(
        draws=jnp.int32(0),
        acc_ema=jnp.asarray(np.where(visits_N > 0, rng.random(size), 0.5), jnp.float32),
        visits=jnp.asarray(visits_N, jnp.int32),
        last_seen=jnp.asarray(np.where(visits_N > 0, rng.integers(0, size, size), -1), jnp.int32),
        drawn_S=jnp.full((streams,), size, jnp.int32),
    )
    stream_P, key = jnp.asarray(rng.integers(0, streams, num_prompts), jnp.int32), jax.random.key(0)
    counts_S = jnp.zeros((streams,), jnp.int32).at[stream_P].add(1)
    shares, draw, update = (
        jax.jit(functools.partial(function, CONFIG))
        for function in (prompt_level.probabilities, prompt_level.draw, prompt_level.update)
    )
    index_P, drawn = draw(where, state, key, stream_P)
    pass_P, valid_P = jnp.asarray(rng.random(num_prompts), jnp.float32), jnp.ones(num_prompts, bool)
    p_N = np.asarray(shares(where, state, counts_S), np.float64)
    p_N *= np.asarray(counts_S)[where.stream_N]  # of the whole batch, as numpy wants them
    p_N /= p_N.sum()
    calls = (
        lambda: shares(where, state, counts_S),
        lambda: draw(where, state, key, stream_P),
        lambda: update(drawn, index_P, pass_P, valid_P),
        lambda: rng.choice(size, num_prompts, p=p_N),
    )
    times = [[] for _ in calls]
    for _ in range(repeats + 2):  # two calls warm each of them up
        for kept, call in zip(times, calls):
            start = time.perf_counter()
            jax.block_until_ready(call())
            kept.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(kept[2:]) for kept in times]


def equal_groups(uncertainty_weight: float, epochs: int, seed: int) -> list[float]:
    """Part of the groups without a difference, by epoch of draws; first what it is when all are drawn alike."""
    size, prompts, group = 2000, 16, 8
    rng, config = np.random.default_rng(seed), dataclasses.replace(CONFIG, uncertainty_weight=uncertainty_weight)
    rate_N, where = rng.beta(0.3, 0.3, size), jax.tree.map(jnp.asarray, prompt_level.layout([size]))
    draw = jax.jit(functools.partial(prompt_level.draw, config))
    update = jax.jit(functools.partial(prompt_level.update, config))
    state, stream_P, equal = prompt_level.init(where), jnp.zeros(prompts, jnp.int32), []
    for k in range(epochs * size // prompts):
        index_P, state = draw(where, state, jax.random.fold_in(jax.random.key(seed), k), stream_P)
        pass_P = rng.binomial(group, rate_N[np.asarray(index_P)]) / group
        state = update(state, index_P, jnp.asarray(pass_P, jnp.float32), jnp.ones(prompts, bool))
        equal.append(np.mean((pass_P == 0) | (pass_P == 1)))
    alike = np.mean(rate_N**group + (1 - rate_N) ** group)
    return [alike, *(np.mean(part) for part in np.array_split(equal, epochs))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--streams", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    given = parser.parse_args()
    device = jax.devices()[0]
    print(
        f"{device.platform} ({device.device_kind}), P = {given.prompts} from {given.streams} streams, "
        f"median of {given.repeats} calls, ms"
    )
    print(f"{'N':>9}" + "".join(f"{name:>10}" for name in ("shares", "draw", "update", "choice")))
    for size in given.sizes:
        medians = row(size, given.streams, given.prompts, given.repeats)
        print(f"{size:>9}" + "".join(f"{ms:>10.3f}" for ms in medians))
    print("\ngroups without a difference, mean of 5 seeds: all prompts alike, then by priority in epoch 1 to 5")
    for weight in (1.0, CONFIG.uncertainty_weight, 4.0):
        parts = np.mean([equal_groups(weight, 5, seed) for seed in range(5)], axis=0)
        print(f"uncertainty_weight = {weight}" + "".join(f"{part:>8.3f}" for part in parts))


if __name__ == "__main__":
    main()
