"""The simulated worlds: what distinguishes them, and the random learner that a (regime, seed) stands for.

Per domain, drawn from the seed: skill before training uniform on [-3, 0] logits, learning and forgetting rates
log-normal (0, spread / 2), transfer between domains of one of about D / 4 clusters uniform on [0, 0.06], between others
-0.002. Two more domains are evaluated only.

`default` and `full` are the grids of the ablation. `tuning` and `heldout` serve the search for a policy: parameters are
chosen on the first, on seeds of their own, and judged on the second, which has other speeds, spreads, sizes and
combinations.
"""

import zlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

LEARNING = 0.0133  # logits a step that a domain learns with the whole batch at p = 1/2, times the number of domains
NEVER = 2**31 - 1
UNSEEN = 2  # domains evaluated only, in every regime


@dataclass(frozen=True)
class Regime:
    """What a world is like; the defaults are the plain one."""

    trained: int = 18  # domains that may be trained on
    prompts: int = 64  # P, groups a step
    decay: float = 0.002  # typical forgetting a step, per logit above the start
    spread: float = 1.0  # of rates over domains; the start's range grows with its root
    alpha: float = 1.0  # exponent of a domain's share: below 1 returns diminish
    budget: float = 1.0  # factor of the learning rate
    zipf: bool = False  # training rows 1/k of the largest domain's; otherwise equal
    phases: int = 1  # groups of domains, arriving at equal distances
    dead: int = 0  # domains never passed
    noisy: int = 0  # domains passed by a coin toss
    binary: float = 0.0  # share of domains whose grader says 1 or 4 only; with it the noisy ones' too
    shocks: float = 0.0  # share of domains that lose SHOCK logits once, in the middle part of the run


SHOCK = 2.0  # logits

PLAIN = Regime()
DEFAULT = {
    "plain": PLAIN,
    "fast": replace(PLAIN, decay=0.008),
    "sizes": replace(PLAIN, zipf=True),
    "arrivals": replace(PLAIN, phases=5),
    "dead": replace(PLAIN, dead=1),
    "noisy": replace(PLAIN, noisy=1),
    "many": replace(PLAIN, prompts=6),
    "drifting": replace(PLAIN, shocks=0.5),
}
LARGE = {"d100": replace(PLAIN, trained=98), "d400": replace(PLAIN, trained=398)}
HELDOUT = {
    "slow": replace(PLAIN, decay=0.0005),
    "quick": replace(PLAIN, decay=0.005),
    "hard": replace(PLAIN, spread=1.75),
    "equal": replace(PLAIN, spread=0.2),
    "concave": replace(PLAIN, alpha=0.7),
    "scarce": replace(PLAIN, budget=0.5),
    "dead3": replace(PLAIN, dead=3),
    "small": replace(PLAIN, trained=5),
    "small_dead": replace(PLAIN, trained=5, dead=1),
    "small_arrivals": replace(PLAIN, trained=5, phases=5, decay=0.004),
    "arrivals3_zipf": replace(PLAIN, trained=12, phases=3, zipf=True),
    "graders": replace(PLAIN, trained=12, noisy=1, binary=0.5, decay=0.003),
    "noisy2": replace(PLAIN, trained=10, noisy=2),
    "many4": replace(PLAIN, trained=12, prompts=4, decay=0.003),
    "drift_quick": replace(PLAIN, trained=12, shocks=1.0, decay=0.004),
    "all_at_once": replace(PLAIN, trained=16, phases=4, dead=1, noisy=1, zipf=True, shocks=0.25),
}
TUNING = DEFAULT | {"graders": replace(PLAIN, noisy=1, binary=0.5)}
GRIDS = {"default": DEFAULT, "full": DEFAULT | LARGE, "tuning": TUNING, "heldout": HELDOUT}
FIRST_SEED = {"tuning": 1000}  # elsewhere 0: what is tuned on is never judged on


class World(NamedTuple):
    """One toy learner and its domains, arrays [D] unless said otherwise."""

    start: np.ndarray  # f32 logits, the skill before training
    rate: np.ndarray  # f32 logits a step; 0: does not learn
    decay: np.ndarray  # f32 a step
    transfer: np.ndarray  # f32 [D, D], 1 on the diagonal; row: from
    alpha: np.ndarray  # f32 []
    dead: np.ndarray  # bool
    noisy: np.ndarray  # bool
    binary: np.ndarray  # bool; graded 1 or 4
    trained: np.ndarray  # bool; False: evaluated only, or padding
    measured: np.ndarray  # bool; enters the metrics
    size: np.ndarray  # f32 training rows
    arrives: np.ndarray  # i32 step
    retires: np.ndarray  # i32 step; NEVER
    shock_step: np.ndarray  # i32, step at which SHOCK logits are lost; NEVER


def make_world(name: str, regime: Regime, seed: int, steps: int, num_domains: int) -> World:
    """The world of (name, seed), padded to `num_domains`; a pure function of its arguments."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed])
    n, D = regime.trained, regime.trained + UNSEEN
    trained_D = np.arange(D) < n
    learns_D = np.ones(D, bool)
    special_N = rng.permutation(n)  # which domains are dead and which noisy
    dead_D, noisy_D = np.zeros(D, bool), np.zeros(D, bool)
    dead_D[special_N[: regime.dead]] = True
    noisy_D[special_N[regime.dead : regime.dead + regime.noisy]] = True
    learns_D &= ~(dead_D | noisy_D)

    cluster_D = rng.integers(max(1, D // 4), size=D)
    together_DD = cluster_D[:, None] == cluster_D
    transfer_DD = np.where(together_DD, rng.uniform(0, 0.06, (D, D)), -0.002) * learns_D[:, None]
    np.fill_diagonal(transfer_DD, 1.0)
    wide = 1.5 * np.sqrt(regime.spread)
    start_D = -1.5 + rng.uniform(-wide, wide, D)
    rate_D = LEARNING * n * regime.budget * rng.lognormal(0, 0.5 * regime.spread, D) * learns_D
    decay_D = regime.decay * rng.lognormal(0, 0.5 * regime.spread, D)
    size_D = np.full(D, 1000.0)
    if regime.zipf:
        size_D[:n] = 4000.0 / (1 + rng.permutation(n))
    arrives_D = np.zeros(D, np.int64)
    arrives_D[:n] = np.arange(n) * regime.phases // n * (steps // regime.phases)
    shocked_D = (rng.permutation(D) < round(regime.shocks * D)) & learns_D & trained_D
    shock_step_D = np.where(shocked_D, rng.integers(int(0.3 * steps), max(int(0.8 * steps), 1) + 1, D), NEVER)
    binary_D = (rng.permutation(D) < round(regime.binary * D)) | (noisy_D & (regime.binary > 0))

    def pad(x_D, value=0, dtype=np.float32):
        return np.pad(x_D, (0, num_domains - D), constant_values=value).astype(dtype)

    return World(
        start=pad(start_D),
        rate=pad(rate_D),
        decay=pad(decay_D),
        transfer=np.pad(transfer_DD, (0, num_domains - D)).astype(np.float32),
        alpha=np.float32(regime.alpha),
        dead=pad(dead_D, False, bool),
        noisy=pad(noisy_D, False, bool),
        binary=pad(binary_D, False, bool),
        trained=pad(trained_D, False, bool),
        measured=pad(learns_D, False, bool),
        size=pad(size_D, 1.0),
        arrives=pad(arrives_D, 0, np.int32),
        retires=np.full(num_domains, NEVER, np.int32),
        shock_step=pad(shock_step_D, NEVER, np.int32),
    )
