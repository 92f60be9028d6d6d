"""What would fit: the largest batch and context, and the cheapest change of a plan that does not.

Predictions are planning/memory.py's, calibrated where something was compiled. Powers of two only: what is printed is a
setting, not a limit to the byte.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

from configs.schema import Config, override
from curriculum.sampler import MAX_PROMPTS
from infinite_jax.planning import chips, memory
from infinite_jax.planning.chips import Chip
from infinite_jax.planning.memory import Calibration
from models.architectures import DecoderConfig
from sharding.mesh import AXES

Sized = Callable[[Config, Chip, int], Config]  # (configuration, chip, devices) -> its mesh sizes chosen, or ValueError


class Candidate(NamedTuple):
    """A setting to try."""

    keys: tuple[str, ...]  # what changes, as key=value
    topology: str
    chip: Chip
    config: Config


def decoder_of(config: Config, decoder: DecoderConfig) -> DecoderConfig:
    return dataclasses.replace(decoder, remat=config.model.remat)


def predicted(config: Config, decoder: DecoderConfig, calibration: Calibration) -> memory.Total:
    return memory.total(config, decoder_of(config, decoder), calibration)


def batches(config: Config) -> Iterator[Config]:
    """`config` with 2, 4, 8, ... times as many prompts."""
    algorithm = config.algorithm
    for power in range(1, MAX_PROMPTS.bit_length()):
        prompts = algorithm.prompts << power
        if prompts > MAX_PROMPTS:
            return
        yield dataclasses.replace(config, algorithm=dataclasses.replace(algorithm, prompts=prompts))


def contexts(config: Config, most: int) -> Iterator[Config]:
    """`config` with prompts and completions of 2, 4, 8, ... times the length, up to `most` tokens a row."""
    algorithm = config.algorithm
    factor = 2
    while factor * (algorithm.prompt_buckets[-1] + algorithm.max_new_tokens) <= most:
        longer = dataclasses.replace(
            algorithm,
            prompt_buckets=tuple(bucket * factor for bucket in algorithm.prompt_buckets),
            max_new_tokens=algorithm.max_new_tokens * factor,
        )
        yield dataclasses.replace(config, algorithm=longer)
        factor *= 2


def fitting(
    settings: Iterator[Config], decoder: DecoderConfig, calibration: Calibration, usable: float
) -> list[Config]:
    """Those of growing settings that are predicted to fit, the largest first."""
    found = []
    for config in settings:
        if predicted(config, decoder, calibration).peak > usable:
            break
        found.insert(0, config)
    return found


def remedies(
    config: Config, parameters: int, topology: str, chip: Chip, devices: int, sized: Sized
) -> Iterator[Candidate]:
    """Changes of a plan that does not fit, the cheapest to run with first; mesh sizes are chosen in all of them.

    More fsdp costs traffic, smaller micro-batches utilisation, remat a forward pass, offload the host's bandwidth, a
    larger topology money. Each alone, then all but the last together, then larger topologies without and with the rest.
    """
    knobs = [list(knob(config)) for knob in (_fsdp, _microbatches, _remat, _offload)]

    def candidate(keys: tuple[str, ...], topology: str, chip: Chip, devices: int) -> Iterator[Candidate]:
        moments = 0 if keys[-1] in ("mesh.offload=optimizer", "mesh.offload=both") else 8
        if parameters * (4 + moments) <= devices * chip.usable:  # else no need to look closer
            yield from _candidate(config, keys, topology, chip, devices, sized)

    stacked: tuple[str, ...] = ()
    for keys in [keys for knob in knobs for keys in knob]:
        yield from candidate(keys, topology, chip, devices)
    for keys in [keys for knob in knobs for keys in knob]:
        before, stacked = stacked, _with(stacked, keys)
        if len(stacked) > len(keys) and stacked != before:
            yield from candidate(stacked, topology, chip, devices)
    if topology == "local":
        return
    rest = tuple(key for key in stacked if key.startswith(("model.remat", "mesh.offload")))
    for larger in chips.larger(chip, devices):
        other, shape = chips.named(larger)
        for keys in (CHOSEN, (*CHOSEN, *rest)) if rest else (CHOSEN,):
            yield from candidate(keys, larger, other, chips.num_devices(other, shape))


CHOSEN = tuple(f"mesh.{axis}=0" for axis in (*AXES, "rollout_tensor"))  # sizes by sharding/auto.py


def _with(keys: tuple[str, ...], more: tuple[str, ...]) -> tuple[str, ...]:
    """`keys` with those of `more` in place of theirs."""
    new = {key.partition("=")[0] for key in more}
    return (*(key for key in keys if key.partition("=")[0] not in new), *more)


def _candidate(
    config: Config, keys: tuple[str, ...], topology: str, chip: Chip, devices: int, sized: Sized
) -> Iterator[Candidate]:
    """Nothing where the batch does not divide over it."""
    try:
        changed = sized(override(config, keys), chip, devices)
    except ValueError:
        return
    algorithm, (data, fsdp, _, _) = changed.algorithm, changed.mesh.sizes
    parts = algorithm.minibatches * algorithm.microbatches
    if algorithm.prompts % parts or algorithm.prompts * algorithm.group_size % (parts * data * fsdp):
        return
    shown = tuple(key for key in keys if key not in CHOSEN)
    if CHOSEN[0] in keys:
        shown += tuple(f"mesh.{axis}={size}" for axis, size in zip(AXES, changed.mesh.sizes))
    yield Candidate(shown, topology, chip, changed)


def _fsdp(config: Config) -> Iterator[tuple[str, ...]]:
    data, fsdp, _, _ = config.mesh.sizes
    for part in (2**i for i in range(1, data.bit_length())):
        if data % part == 0:
            yield f"mesh.data={data // part}", f"mesh.fsdp={fsdp * part}"


def _microbatches(config: Config) -> Iterator[tuple[str, ...]]:
    algorithm = config.algorithm
    number = 2 * algorithm.microbatches
    while number <= algorithm.prompts:
        yield (f"algorithm.microbatches={number}",)
        number *= 2


def _remat(config: Config) -> Iterator[tuple[str, ...]]:
    if config.model.remat != "full":
        yield ("model.remat=full",)


def _offload(config: Config) -> Iterator[tuple[str, ...]]:
    order = ("none", "reference", "optimizer", "both")
    stays = config.algorithm.kl_type == "none" or config.model.lora.rank > 0  # none, or the base that is computed with
    for choice in order[order.index(config.mesh.offload) + 1 :]:
        if not (stays and choice in ("reference", "both")):
            yield (f"mesh.offload={choice}",)
