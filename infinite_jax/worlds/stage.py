"""What a compiled run is given: settings, rows, a start, and a world, all a function of the settings and the seed.

Worlds differ in arrays only, so that an arm is compiled once for all of them:

    plain     eight domains, each with rows enough for the run
    arrivals  three, three and two of them arrive at the start, at one third and at two thirds, in random order
    zipf      few rows, 1/k of the largest domain's in random order, gone through again and again
    dead      and a domain whose answers have nothing to do with its prompts
    noisy     and a domain graded by a coin: 4 or 1, whatever is written

Names joined by + make a world of several conditions, such as zipf+dead. Two more domains are only tested, and so is a
harder variant of every domain.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs.schema import nearest
from curriculum.triage import Roster, roster
from infinite_jax.rollout import Sampling, generate
from infinite_jax.types import Params
from infinite_jax.worlds import practice, tasks
from infinite_jax.worlds.table import Probe
from infinite_jax.worlds.tasks import Rows
from models.architectures import DecoderConfig, Rope
from rubric.evaluator import PASS_GRADE

CONDITIONS = ("plain", "arrivals", "zipf", "dead", "noisy")
PHASES = 3  # of arrivals
DATA, START, WORLD, COIN = (1 << 30) + np.arange(4)  # random streams of a seed, far from any step's number
TEMPERATURE = 1.0  # of all sampling: a small model's first choice is right long before it is sure of it
STOP_IDS = (tasks.END,)


@dataclass(frozen=True)
class Settings:
    """Section `compiled` of configs/ablate.yaml. Raises ValueError, one line, on an impossible value."""

    FREE = ("regimes", "parallel")  # what chooses runs and changes none

    draw: str  # tuning | judging: which families of tasks
    regimes: tuple[str, ...]  # worlds, such as plain or zipf+dead
    parallel: int  # runs computed side by side; memory is proportional to it
    steps: int  # updates of a run, a multiple of eval_every
    eval_every: int  # steps
    test_rows: int  # held-out rows a domain and variant
    train_rows: int  # training rows a domain
    zipf_rows: int  # training rows of the largest domain where sizes are unequal
    prompts: int  # P; this, group_size and learning_rate stand in for the run's own, whose model is far larger
    group_size: int  # G
    learning_rate: float
    layers: int
    width: int  # of the residual stream
    heads: int
    dtype: str  # float32 | bfloat16, of matrix products
    practice: practice.Plan

    def __post_init__(self):
        if self.draw not in tasks.DRAWS:
            raise ValueError(f"compiled.draw={self.draw}: {nearest(self.draw, tasks.DRAWS)}")
        if not self.regimes:
            raise ValueError("compiled.regimes=[]: name at least one world, such as compiled.regimes=[plain,zipf+dead]")
        for regime in self.regimes:
            for name in regime.split("+"):
                if name not in CONDITIONS:
                    raise ValueError(f"compiled.regimes: no world {regime}; {nearest(name, CONDITIONS)}")
        for name in ("parallel", "eval_every", "test_rows", "zipf_rows", "prompts", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"compiled.{name}={getattr(self, name)}: must be at least 1")
        if self.group_size < 2:
            raise ValueError(f"compiled.group_size={self.group_size}: must be at least 2, a group compares its samples")
        if self.steps < 1 or self.steps % self.eval_every:
            raise ValueError(f"compiled.steps={self.steps}: must be a multiple of eval_every={self.eval_every}")
        if self.zipf_rows > self.train_rows:
            raise ValueError(f"compiled.zipf_rows={self.zipf_rows}: at most compiled.train_rows={self.train_rows}")
        if self.width < 1 or self.width % (2 * self.heads):
            raise ValueError(f"compiled.width={self.width}: must be a multiple of twice compiled.heads={self.heads}")


class Data(NamedTuple):
    """A seed's rows, leaves [D, N, ...]; the dead and the noisy domain come last and have no held-out rows."""

    train: Rows
    test: Rows
    harder: Rows


class World(NamedTuple):
    members: Roster
    coin_D: jax.Array  # bool, graded by a coin


def take(data: Data, size_D: jax.Array, cursor_D: jax.Array, domain_P: jax.Array) -> tuple[Rows, jax.Array]:
    """The next row of each drawn domain, leaves [P, ...], and the new cursor; rows come round in the same order."""
    before_P = jnp.sum(jnp.tril(domain_P[:, None] == domain_P, -1), axis=1)  # the same domain's, earlier in the batch
    row_P = (cursor_D[domain_P] + before_P) % size_D.astype(jnp.int32)[domain_P]
    return jax.tree.map(lambda x: x[domain_P, row_P], data.train), cursor_D.at[domain_P].add(1)


def decoder_config(settings: Settings) -> DecoderConfig:
    """A plain Llama of the settings' size."""
    rope, head_dim = Rope("default", 100.0, ()), settings.width // settings.heads
    return DecoderConfig(
        family="llama",
        vocab_size=tasks.VOCABULARY,
        embed_dim=settings.width,
        mlp_dim=2 * settings.width,
        num_layers=settings.layers,
        num_heads=settings.heads,
        num_kv_heads=settings.heads,
        head_dim=head_dim,
        max_length=tasks.PROMPT + tasks.ANSWER,
        norm_eps=1e-5,
        norm_offset=0.0,
        tied_embeddings=False,
        qkv_bias=False,
        qk_norm=False,
        post_norms=False,
        activation="silu",
        rope=rope,
        rope_local=rope,
        windows=(0,) * settings.layers,
        embed_scale=1.0,
        query_scale=head_dim**-0.5,
        final_softcap=0.0,
        dtype=settings.dtype,
        remat="none",
        attention="xla",
        unrolled=False,
        lora=None,
    )


def slots(settings: Settings) -> tuple[str, ...]:
    """The family of each of D domains: the trained ones, those only tested, the dead and the noisy one."""
    return (*tasks.DRAWS[settings.draw], "dead", "noisy")


def make_data(settings: Settings, seed: jax.Array) -> Data:
    """Pure and jittable in `seed`, i32[]."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), DATA), 3)
    tested = tasks.DRAWS[settings.draw]
    return Data(
        tasks.stacked(slots(settings), keys[0], settings.train_rows),
        tasks.stacked(tested, keys[1], settings.test_rows),
        tasks.stacked(tested, keys[2], settings.test_rows, harder=True),
    )


def make_start(settings: Settings, seed: jax.Array) -> Params:
    """A seed's parameters at step 0, taught on rows of their own. Pure and jittable in `seed`, i32[]."""
    decoder, tested, plan = decoder_config(settings), tasks.DRAWS[settings.draw], settings.practice
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), START), 4)
    standard = tasks.stacked(tested, keys[0], plan.train_rows)
    harder = tasks.stacked(tested, keys[1], plan.train_rows, harder=True)
    measured = tasks.stacked(tested, keys[2], plan.test_rows)
    return practice.practise(
        decoder, plan, standard, harder, lambda params, key: pass_rates(decoder, params, measured, key), keys[3]
    )[0]


def make_world(settings: Settings, regime: str, seed: int) -> World:
    """The world of a seed, on the host."""
    rng, names = np.random.default_rng([int(WORLD), seed]), slots(settings)
    conditions, trained = regime.split("+"), tasks.TRAINED
    phase_N, rank_N = rng.permutation(trained) * PHASES // trained, rng.permutation(trained) + 1
    active_D, arrives_D = np.arange(len(names)) < trained, np.zeros(len(names), np.int32)
    size_D = np.full(len(names), settings.train_rows)
    if "arrivals" in conditions:
        arrives_D[:trained] = phase_N * settings.steps // PHASES
    if "zipf" in conditions:
        size_D[:trained] = np.maximum(settings.zipf_rows // rank_N, 1)
        size_D[trained:] = size_D[:trained].mean()
    for name in ("dead", "noisy"):
        active_D[names.index(name)] = name in conditions
    members = roster(len(names), size=size_D, active=active_D, arrives=arrives_D)
    return World(members, jnp.arange(len(names)) == names.index("noisy"))


def withhold(settings: Settings, probe: Probe) -> tuple[int, int] | None:
    """(domain, step after which it is withheld), or None. Raises ValueError, one line, on one that is not there."""
    if not probe.domain:
        return None
    trained = tasks.DRAWS[settings.draw][: tasks.TRAINED]
    if probe.domain not in trained:
        raise ValueError(f"probe={probe.domain}: not a domain trained on; {nearest(probe.domain, trained)}")
    return trained.index(probe.domain), probe.ends(settings.steps, "compiled.steps")


def pass_rates(decoder: DecoderConfig, params: Params, rows: Rows, key: jax.Array) -> jax.Array:
    """Share of rows passed by one sampled reply each, f32[D]; rows have leaves [D, N, ...]. `key` is consumed."""
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
    sampling = Sampling(TEMPERATURE, 0, 1.0, tasks.ANSWER, 1, STOP_IDS, tasks.PAD)
    made = generate(decoder, sampling, params, flat.prompt_NT, flat.length_N, key)
    grade_N = tasks.grade(tasks.completions(made.tokens_BT, flat.length_N), flat.answer_NC)
    return jnp.mean(grade_N.reshape(rows.length_N.shape) >= PASS_GRADE, axis=1)
