"""Compiles a run ahead of time and says whether it fits, what moves between the devices, and how fast it can be.

    python -m infinite_jax.plan topology=v5p:4x4x4 model=llama3_8b [search=false] [key=value ...]

The other keys are those of a run: what is planned is what `python -m infinite_jax.train` would do with them on that
topology. A TPU topology is compiled for on any Linux machine, through libtpu (pip install 'jax[tpu]'); topology=local
means this machine's GPUs. Exit code 1 where it does not fit, with the cheapest change with which it would.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

import yaml
from jax.sharding import Mesh

from configs import cli, limits, schema
from configs.schema import Config
from infinite_jax import placement
from infinite_jax.planning import chips, fit, memory, programs, table
from infinite_jax.planning.chips import GIB, Chip
from infinite_jax.planning.memory import Calibration
from infinite_jax.planning.programs import Program
from infinite_jax.planning.roofline import rollout_work, roofline, train_work
from kernels import select
from models import source
from models.architectures import DecoderConfig, unrolls
from sharding.mesh import axis_sizes, make_mesh, make_rollout_mesh, with_sizes

TRIES = 3  # compilations spent on one question


@dataclass(frozen=True)
class PlanConfig:
    """The verb's own keys."""

    topology: str  # <chip>:<shape> | local
    search: bool  # look for the largest batch and context


class Target(NamedTuple):
    """What is planned for."""

    topology: str
    chip: Chip
    size: int  # devices


class Compiled(NamedTuple):
    """A configuration with its programs."""

    config: Config
    mesh: Mesh
    sampling: Mesh  # the rollout's
    update: Program
    rollout: Program
    kinds: dict[str, tuple]  # kind of memory -> bytes in the update, in the rollout

    @property
    def peak(self) -> float:
        return max(table.totals(self.kinds))

    @property
    def refused(self) -> bool:
        return self.update.counts is None or self.rollout.counts is None

    def fits(self, chip: Chip) -> bool:
        return not self.refused and self.peak <= chip.usable


def main(argv: Sequence[str] | None = None) -> int:
    arguments = cli.parser("plan", __doc__)
    cli.add_config_arguments(arguments)
    given = arguments.parse_args(argv)
    with cli.bad_input():
        own, rest = split(given.overrides)
        settings = read(own)
        config = cli.compose_config(given.config_name, given.config_dir, rest)
        target = Target(settings.topology, *chips.prepare(settings.topology))
        decoder = network(config, target.chip)
        limits.validate(config, target.size)
        config, reason = sized(config, decoder, target.chip, target.size)
    if reason:
        print(reason)
    return plan(config, decoder, target, settings.search)


def split(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the verb's own assignments, those of a run). Raises ValueError, one line, on a key of neither."""
    names = [field.name for field in dataclasses.fields(PlanConfig)]
    groups = {key.split(".")[0] for key in schema.known_keys()}
    own, rest = [], []
    for override in overrides:
        key, equals, _ = override.partition("=")
        if equals and key not in names and key.lstrip("+~").split(".")[0] not in groups:
            raise ValueError(f"unknown key {override}: {schema.nearest_key(key, names)}")
        (own if key in names else rest).append(override)
    return own, rest


def read(assignments: Sequence[str]) -> PlanConfig:
    """configs/plan.yaml with `assignments`."""
    data = yaml.safe_load(resources.files("configs").joinpath("plan.yaml").read_text(encoding="utf-8"))
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        data[key] = value if isinstance(data[key], str) else yaml.safe_load(value)
    return schema.build(PlanConfig, data)


def network(config: Config, chip: Chip) -> DecoderConfig:
    """The model's shape, in the dtype and with the attention that training has on such a chip."""
    model = config.model
    decoder = source.network(dataclasses.replace(model, attention="auto"))  # which would be this machine's
    dtype = "bfloat16" if model.dtype == "auto" else model.dtype
    wanted = {"head_dim": decoder.head_dim, "dtype": dtype, "windows": any(decoder.windows), "packed": False}
    attention = select.choose(model.attention, chip.platform, chip.kind, **wanted)
    return dataclasses.replace(decoder, dtype=dtype, attention=attention, unrolled=unrolls(chip.platform))


def sized(config: Config, decoder: DecoderConfig, chip: Chip, devices: int) -> tuple[Config, str]:
    """`config` with its mesh sizes chosen for so many devices of the chip, and why. Raises ValueError, one line."""
    mesh, reason = placement.chosen(config, decoder, devices, int(chip.usable))
    return dataclasses.replace(config, mesh=with_sizes(mesh, axis_sizes(mesh, devices))), reason


def plan(config: Config, decoder: DecoderConfig, target: Target, search: bool) -> int:
    """Prints the table; the exit code."""
    chip = target.chip
    resident = memory.resident(config, decoder, memory.abstract_mesh(config))
    sizes = memory.num_parameters(decoder), memory.num_trained(decoder)
    print(table.head(config, decoder, *sizes, target.topology, chip, target.size))
    if resident.device > chip.usable:
        print(f"\n{table.state(resident, chip)}\n")
        print(f"does not fit: the state alone takes {shown(resident.device)} of {shown(chip.usable)} GiB")
        print(f"cheapest change: {remedy(config, decoder, target, Calibration())}")
        return cli.FAILED
    found = compiled(config, decoder, target)
    print(f"\n{table.memory(found.kinds, resident, chip)}")
    if not found.refused:
        print(f"\n{moved(found, decoder, target)}")
    print()
    if not found.fits(chip):
        print(f"does not fit: {shown(found.peak)} of {shown(chip.usable)} GiB")
        print(f"cheapest change: {remedy(config, decoder, target, calibrated([found], decoder))}")
        return cli.FAILED
    print(f"fits: {shown(found.peak)} of {shown(chip.usable)} GiB")
    if search:
        print_largest(found, decoder, target)
    return cli.DONE


def compiled(config: Config, decoder: DecoderConfig, target: Target) -> Compiled:
    """Both programs of a configuration whose mesh sizes are chosen."""
    decoder = fit.decoder_of(config, decoder)
    with cli.bad_input():
        devices = chips.devices(target.topology)
    mesh = make_mesh(config.mesh, devices)
    sampling = make_rollout_mesh(config.mesh, mesh, devices)
    algorithm, offload = config.algorithm, config.mesh.offload
    update = _told("the update", lambda: programs.compile_update(algorithm, decoder, mesh, offload))
    params = programs.rollout_params(decoder, mesh, sampling)
    rollout = _told("the rollout", lambda: programs.compile_rollout(algorithm, decoder, sampling, params))
    kinds = table.phases(
        memory.resident(config, decoder, mesh),
        update,
        rollout,
        keys_values=memory.kv_cache(config, decoder),
        weights=memory.cast_weights(decoder, sampling),
        copied=programs.copied(decoder, mesh, sampling),
        shared=not config.mesh.rollout_devices,
    )
    return Compiled(config, mesh, sampling, update, rollout, kinds)


def _told(name: str, compile_one) -> Program:
    """The wait is long: says so on standard error."""
    print(f"compiling {name} ...", end="", file=sys.stderr, flush=True)
    began = time.monotonic()
    program = compile_one()
    print(f" {time.monotonic() - began:.0f} s", file=sys.stderr)
    return program


def moved(found: Compiled, decoder: DecoderConfig, target: Target) -> str:
    """Collectives, operations and times."""
    pairs = ((found.update, found.mesh), (found.rollout, found.sampling))
    works = (train_work(decoder, found.config.algorithm), rollout_work(decoder, found.config.algorithm))
    lines = [roofline(target.chip, program.counts, list(mesh.devices.flat)) for program, mesh in pairs]
    sizes = [mesh.size for _, mesh in pairs]
    parts = [
        table.collectives(name, program.counts.collectives, mesh)
        for name, (program, mesh) in zip(("update", "rollout"), pairs)
    ]
    return "\n\n".join([*parts, table.times(target.chip, sizes, works, [found.update, found.rollout], lines)])


def calibrated(known: Sequence[Compiled], decoder: DecoderConfig) -> Calibration:
    """The memory model's factors from one or two compiled configurations."""
    points = [
        (memory.update_temporaries(each.config, fit.decoder_of(each.config, decoder)), beyond_state(each)[0])
        for each in known
    ]
    fixed, moving = memory.calibrate(points)
    first = known[0]
    estimate = memory.kv_cache(first.config, decoder) + memory.rollout_temporaries(first.config, decoder)
    code = first.kinds["programs"][0]
    return Calibration(fixed, moving, beyond_state(first)[1] / estimate, code, compiled=True)


def beyond_state(found: Compiled) -> tuple[float, float]:
    """Bytes of a device that the update and the rollout need beside the state and the programs."""
    kept = ("parameters", "optimizer", "reference", "programs")
    return table.totals({name: sizes for name, sizes in found.kinds.items() if name not in kept})


def print_largest(found: Compiled, decoder: DecoderConfig, target: Target) -> None:
    """The largest batch and context, predicted after a second compilation and verified by another."""
    known = {found.config: found}

    def compile_once(config: Config) -> Compiled:
        if config not in known:
            known[config] = compiled(config, decoder, target)
        return known[config]

    twice = next(fit.batches(found.config), None)
    calibration = calibrated([found, compile_once(twice)] if twice else [found], decoder)
    usable = target.chip.usable
    batch = largest(fit.fitting(fit.batches(found.config), decoder, calibration, usable), found, compile_once, target)
    prompts, group = batch.config.algorithm.prompts, batch.config.algorithm.group_size
    print(f"largest batch: {prompts} prompts x {group} samples, compiled, {shown(batch.peak)} GiB")
    growing = fit.fitting(fit.contexts(found.config, decoder.max_length), decoder, calibration, usable)
    context = largest(growing, found, compile_once, target)
    algorithm = context.config.algorithm
    width, new = algorithm.prompt_buckets[-1], algorithm.max_new_tokens
    note = f"; the model was trained for {decoder.max_length}" if 2 * (width + new) > decoder.max_length else ""
    print(f"largest context: {width} + {new} tokens, compiled, {shown(context.peak)} GiB{note}")


def largest(settings: Sequence[Config], found: Compiled, compile_once, target: Target) -> Compiled:
    """The first of `settings`, the largest first, whose programs fit; `found` where none of the first few does."""
    for config in settings[:TRIES]:
        tried = compile_once(config)
        if tried.fits(target.chip):
            return tried
    return found


def remedy(config: Config, decoder: DecoderConfig, target: Target, calibration: Calibration) -> str:
    """The first change that the memory model says would do; compiled, where the plan itself was compiled."""
    tries = 0
    for found in fit.remedies(config, memory.num_trained(decoder), *target, chooser(decoder)):
        usable = found.chip.usable
        predicted = fit.predicted(found.config, decoder, calibration).peak
        if predicted > usable:
            continue
        elsewhere = found.topology != target.topology
        text = " ".join((*[f"topology={found.topology}"] * elsewhere, *found.keys))
        if not calibration.compiled:
            return f"{text}: {shown(predicted)} of {shown(usable)} GiB, by the memory model"
        tried = compiled(found.config, decoder, Target(found.topology, *chips.prepare(found.topology)))
        if tried.fits(found.chip):
            return f"{text}: {shown(tried.peak)} of {shown(usable)} GiB, compiled"
        tries += 1
        if tries == TRIES:
            break
    return "none was found; plan with a smaller model, batch or context"


def chooser(decoder: DecoderConfig) -> fit.Sized:
    return lambda config, chip, devices: sized(config, decoder, chip, devices)[0]


def shown(size: float) -> str:
    return f"{size / GIB:.2f}"


if __name__ == "__main__":
    sys.exit(main())
