"""Bounds on time: what the model must compute, what a compiled program moves, and what the chip can do.

    model flops   2 x weights of matrices a token, + 4 H D a pair of query and key it sees, a layer; forward. Training:
                  three times that (Kaplan et al., arXiv 2001.08361, section 2.1, with attention counted exactly), of
                  weights under adapters twice.
    step >=       max(flops / peak, HBM bytes / bandwidth, bytes sent / links)      Williams et al. 2009
    MFU  <=       model flops / (devices x peak x step)                             PaLM, arXiv 2204.02311, appendix B

Prompts count once a group, as the trainer computes them, and rows at their full length. Left out: recomputation (in the
program's flops, not in the model's), the two forward passes that score a batch, latencies, and the host.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from configs.schema import AlgorithmConfig
from infinite_jax.planning import chips
from infinite_jax.planning.chips import Chip
from infinite_jax.planning.counts import Collective, Counts
from models.architectures import DecoderConfig


def layer_weights(decoder: DecoderConfig) -> int:
    """Elements of one layer's matrices."""
    heads = decoder.num_heads * 2 + decoder.num_kv_heads * 2
    return decoder.embed_dim * (heads * decoder.head_dim + 3 * decoder.mlp_dim)


def head_weights(decoder: DecoderConfig) -> int:
    return decoder.embed_dim * decoder.vocab_size


def pairs(before: int, tokens: int, window: int) -> int:
    """Pairs of query and key, itself included, of `tokens` causal tokens behind `before` others; window 0 = all."""
    seen = before + 1 + np.arange(tokens, dtype=np.int64)
    return int((np.minimum(seen, window) if window else seen).sum())


def forward_flops(decoder: DecoderConfig, before: int, tokens: int, head: bool) -> float:
    """Of one row of `tokens` behind `before` others; with `head`, each through the vocabulary, too."""
    weights = layer_weights(decoder) * decoder.num_layers + head * head_weights(decoder)
    seen = sum(pairs(before, tokens, window) for window in decoder.windows)
    return 2.0 * weights * tokens + 4.0 * decoder.num_heads * decoder.head_dim * seen


class Work(NamedTuple):
    """Of one step on all devices together."""

    flops: float
    tokens: int  # that go through the layers


def rollout_work(decoder: DecoderConfig, config: AlgorithmConfig) -> Work:
    width, new, rows = config.prompt_buckets[-1], config.max_new_tokens, config.prompts * config.group_size
    prompts = config.prompts * forward_flops(decoder, 0, width, head=False)
    flops = prompts + rows * forward_flops(decoder, width, new, head=True)
    return Work(flops, config.prompts * width + rows * new)


def train_work(decoder: DecoderConfig, config: AlgorithmConfig) -> Work:
    """A forward pass of the same tokens as the rollout's, and a backward pass of twice that, an epoch.

    Frozen weights have no gradient, which is half of their backward pass; the thin factors beside them are not counted.
    """
    once = rollout_work(decoder, config)
    frozen = rollout_work(dataclasses.replace(decoder, windows=()), config).flops if decoder.lora else 0.0
    return Work(config.epochs * (3 * once.flops - frozen), config.epochs * once.tokens)


class Roofline(NamedTuple):
    """Seconds that one device needs at least."""

    compute: float
    hbm: float
    links: float  # all collectives
    exposed: float  # those of the collectives that no computation overlaps

    @property
    def bound(self) -> float:
        return max(self.compute, self.hbm, self.links)

    @property
    def scheduled(self) -> float:
        """As the program is scheduled: collectives that nothing overlaps come on top."""
        return max(self.compute, self.hbm, self.links - self.exposed) + self.exposed

    @property
    def by(self) -> str:
        """What bounds."""
        return max(("compute", self.compute), ("HBM", self.hbm), ("links", self.links), key=lambda part: part[1])[0]


def roofline(chip: Chip, counts: Counts, devices: Sequence[jax.Device]) -> Roofline:
    """`devices`: of the program's mesh, in its flat order."""
    seconds = [(sending_time(chip, each, devices), each.overlaps) for each in counts.collectives]
    return Roofline(
        compute=counts.flops / chip.flops,
        hbm=counts.bytes / chip.bandwidth,
        links=sum(time for time, _ in seconds),
        exposed=sum(time for time, overlaps in seconds if not overlaps),
    )


def sending_time(chip: Chip, collective: Collective, devices: Sequence[jax.Device]) -> float:
    if collective.groups.shape[1] < 2:
        return 0.0
    members = [devices[number] for number in collective.groups[0]]
    return collective.sent / chips.outgoing(chip, members, neighbours=collective.op == "collective-permute")


def mfu(chip: Chip, work: Work, num_devices: int, seconds: float) -> float:
    return work.flops / (num_devices * chip.flops * seconds)
