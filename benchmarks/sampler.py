"""Cost of scheduling: what one training step spends on shares, draw and state, beside numpy drawing the same batch.

    python benchmarks/sampler.py [--policy faithful] [--prompts 512] [--repeats 30] [--domains 10 1000 ...]

Prints a table of median milliseconds a call, jitted and warm, the result waited for:

    shares    Policy.probabilities: priorities, softmax, floor
    draw      Policy.draw: shares, systematic counts, random order
    update    Policy.update from given statistics
    choice    numpy Generator.choice(D, P, p=p): independent prompts, given the shares
    multinomial  numpy Generator.multinomial(P, p), repeated to ids and shuffled, given the shares

numpy's columns start from finished shares and spread their counts more; `draw - shares` is the like-for-like figure.
Bands, ages and variances are random, so that the floor binds for some domains.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from configs.cli import compose_config
from curriculum import policies
from curriculum.triage import DomainStats, roster


def median_ms(function, repeats: int) -> float:
    """Median time of a call in ms; `function` returns what has to be waited for. Two calls warm it up."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def row(name: str, num_domains: int, num_prompts: int, repeats: int) -> list[float]:
    """Medians in ms: shares, draw, update, choice, multinomial."""
    rng, D = np.random.default_rng(0), num_domains
    policy = policies.build(compose_config("config", None, [f"curriculum={name}"]).curriculum)
    seen_D = jnp.asarray(rng.integers(-1, 100, D), jnp.int32)
    state = policy.init(0, roster(D))._replace(
        step=jnp.int32(100),
        performance_band=jnp.asarray(rng.integers(0, 3, D), jnp.int32),
        last_seen_step=seen_D,
        last_tried_step=seen_D,
        grade_uncertainty=jnp.asarray(rng.uniform(0, 2.25, D), jnp.float32),
        base_log_w=jnp.asarray(rng.normal(0, 2, D), jnp.float32),
    )
    n = jnp.asarray(rng.integers(0, 2, D), jnp.float32)
    stats = DomainStats(n, n / 2, 10 * n, 29 * n, 4 * n, 0 * n, n / 2, n, n / 2, n, n)
    shares, update = jax.jit(policy.probabilities), jax.jit(policy.update)
    draw = jax.jit(policy.draw, static_argnums=1)
    p = np.asarray(shares(state), np.float64)
    p /= p.sum()
    return [
        median_ms(lambda: shares(state), repeats),
        median_ms(lambda: draw(state, num_prompts), repeats),
        median_ms(lambda: update(state, stats), repeats),
        median_ms(lambda: rng.choice(D, num_prompts, p=p), repeats),
        median_ms(lambda: rng.permutation(np.repeat(np.arange(D), rng.multinomial(num_prompts, p))), repeats),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="faithful", choices=policies.NAMES)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--domains", type=int, nargs="+", default=[10, 100, 1000, 10_000, 100_000, 1_000_000])
    args = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.platform} ({device.device_kind}), P = {args.prompts}, median of {args.repeats} calls, ms")
    print(f"{'D':>9}" + "".join(f"{name:>13}" for name in ("shares", "draw", "update", "choice", "multinomial")))
    for num_domains in args.domains:
        print(
            f"{num_domains:>9}"
            + "".join(f"{ms:>13.3f}" for ms in row(args.policy, num_domains, args.prompts, args.repeats))
        )


if __name__ == "__main__":
    main()
