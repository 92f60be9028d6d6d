"""Compares curricula: arms x seeds in a world, one table of paired differences, pictures.

python -m infinite_jax.ablate [world=simulated|compiled|real] [arms=[faithful,uniform]] [seeds=N] [run.dir=DIR] [...]

Keys of the verb itself stand in configs/ablate.yaml, all others are those of a run. An arm is a file of
configs/curriculum/, with changes as "recommended,uncertainty_weight=3". RUN_DIR/ablate.csv has a line for each world,
regime, arm, seed and metric; the same command with the same run.dir continues: what the file holds is not run again.
"""

import dataclasses
import datetime
import hashlib
import importlib
import itertools
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from configs import cli, idle, schema
from infinite_jax.worlds import criteria, plots, table
from infinite_jax.worlds.table import Arm, Probe

WORLDS = {"simulated": "sim", "compiled": "compiled", "real": "real"}  # module of infinite_jax.worlds -> its section
# Keys of a run that place it or bound its files, and enter no result.
FREE = ("run.dir", "run.name", "run.checkpoint_every", "run.keep_last", "run.keep_best", "mesh")


@dataclass(frozen=True)
class AblateConfig:
    """The verb's own keys; each world has a section beside them. Raises ValueError on an impossible value."""

    world: str  # simulated | compiled | real
    arms: tuple[str, ...]  # curriculum presets, with changes after a comma
    seeds: int  # paired
    first_seed: int  # seeds first_seed .. first_seed + seeds - 1
    baselines: tuple[str, ...]  # arms that all others are compared with
    judged: tuple[str, ...]  # arms held to the AURC criteria
    pictures: tuple[str, ...]  # arms drawn
    probe: str  # a domain withheld after probe_after steps; "" = none
    probe_after: int  # steps; 0 = half of the run

    def __post_init__(self):
        if self.world not in WORLDS:
            raise ValueError(f"world={self.world}: {schema.nearest(self.world, WORLDS)}")
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds}: must be at least 1")
        if self.first_seed < 0:
            raise ValueError(f"first_seed={self.first_seed}: must be at least 0")
        if self.probe_after < 0:
            raise ValueError(f"probe_after={self.probe_after}: must be a step, 0 or more")
        if not self.arms:
            raise ValueError("arms=[]: name at least one, such as arms=[faithful,uniform]")
        if repeated := [arm for i, arm in enumerate(self.arms) if arm in self.arms[:i]]:
            raise ValueError(f"arms: {repeated[0]} is named twice; leave one out")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = cli.parser("ablate", __doc__)
    cli.add_config_arguments(arguments)
    given = arguments.parse_args(argv)
    with cli.bad_input():
        own, rest = split(given.overrides)
        config, section = read(own)
        world = importlib.import_module(f"infinite_jax.worlds.{config.world}")
        settings = schema.build(world.Settings, section, WORLDS[config.world])
        arms = [compose_arm(name, given.config_name, given.config_dir, rest) for name in config.arms]
        idle.check([arm.config for arm in arms], rest)
        run_dir = choose(arms[0].config.run.dir)
        rows = table.load(run_dir / "ablate.csv")
        probe = Probe(config.probe, config.probe_after)
        world.check(settings, arms, probe)
        remember(run_dir, config.world, settings, arms, probe)
    rows += run(run_dir, config, world, settings, arms, probe, rows)
    report(run_dir, config, rows)
    return cli.DONE


def split(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the verb's own assignments, those of a run). Raises ValueError, one line, on a key of neither."""
    own_keys = [field.name for field in dataclasses.fields(AblateConfig)] + list(WORLDS.values())
    groups = {key.split(".")[0] for key in schema.known_keys()}
    own, rest = [], []
    for override in overrides:
        key, equals, _ = override.partition("=")
        first = key.lstrip("+~").split(".")[0]
        if equals and key == "curriculum":
            raise ValueError(f"argument {override!r}: the arms choose the curriculum; set arms=[...]")
        if equals and first not in own_keys and first not in groups:
            raise ValueError(f"unknown key {override}: {schema.nearest_key(key, own_keys)}")
        (own if first in own_keys else rest).append(override)
    return own, rest


def read(assignments: Sequence[str]) -> tuple[AblateConfig, dict]:
    """configs/ablate.yaml with `assignments`, as the verb's config and the chosen world's section (plain data)."""
    data = yaml.safe_load(resources.files("configs").joinpath("ablate.yaml").read_text(encoding="utf-8"))
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        *sections, name = key.split(".")
        place = data
        for section in sections:
            place = place.get(section)
            if not isinstance(place, dict):
                raise ValueError(f"unknown key {key}: {schema.nearest(key, _dotted(data))}")
        if name not in place or isinstance(place[name], dict):
            raise ValueError(f"unknown key {assignment}: {schema.nearest(key, _dotted(data))}")
        loaded = value if isinstance(place[name], str) else yaml.safe_load(value)  # probe=2 is a name, too
        place[name] = [loaded] if isinstance(place[name], list) and isinstance(loaded, str) else loaded
    sections = {name: data.pop(name, {}) for name in WORLDS.values()}
    config = schema.build(AblateConfig, data)
    return config, sections[WORLDS[config.world]]


def _dotted(data: dict, prefix: str = "") -> list[str]:
    """Dotted keys of the leaves."""
    leaves = []
    for name, value in data.items():
        leaves += _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return leaves


def compose_arm(name: str, config_name: str, config_dir: str | None, overrides: Sequence[str]) -> Arm:
    """The arm's run configuration: the named file of configs/curriculum/ with the changes behind the commas.

    A change names a key of the curriculum, uncertainty_weight=3, or with its section any other, rubric.reward=pass. The
    arm has to read its changes; of `overrides`, which all arms share, another arm may be the one that does.

    Raises ValueError, one line, with the nearest name where there is no such file.
    """
    preset, *changes = re.split(r",(?![^\[]*\])", name)  # a comma inside [...] belongs to a value
    known = {Path(file.name).stem for file in resources.files("configs").joinpath("curriculum").iterdir()}
    if config_dir:
        known |= {file.stem for file in Path(config_dir).glob("curriculum/*.yaml")}
    if preset not in known:
        raise ValueError(f"arms: there is no curriculum {preset!r}; {schema.nearest(preset, sorted(known))}")
    for change in changes:
        if "=" not in change:
            raise ValueError(f"arms: {name!r}: expected key=value behind the comma, such as {preset},beta=0.1")
    sections = {key.split(".")[0] for key in schema.known_keys()}
    changes = [change if change.split(".")[0] in sections else f"curriculum.{change}" for change in changes]
    own = [*overrides, f"curriculum={preset}", *changes]

    def compose(more: Sequence[str]) -> schema.Config:
        return cli.compose_config(config_name, config_dir, [*own, *more], changes)

    return Arm(name, compose([]), compose)


def choose(given: str) -> Path:
    """run.dir (default runs/ablate-<UTC time>). Raises ValueError where it holds something else than an ablation."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    folder = Path(given or f"runs/ablate-{stamp}")
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "ablate.yaml").is_file())):
        raise ValueError(f"run.dir={folder} is not empty and holds no ablation: name another")
    return folder


def remember(run_dir: Path, world: str, settings: Any, arms: Sequence[Arm], probe: Probe) -> None:
    """Writes RUN_DIR/ablate.yaml: what the rows of the table were measured with.

    Raises ValueError, one line, where the table holds rows of another setting or of an arm that was different then.
    A world's Settings may name keys that choose what is run and change no row: FREE.
    """
    path = run_dir / "ablate.yaml"
    saved = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    before = saved.setdefault(world, {"settings": {}, "arms": {}})
    free = getattr(settings, "FREE", ())
    now = json.loads(json.dumps(dataclasses.asdict(settings)))
    for key, value in now.items():
        if key not in free and before["settings"].get(key, value) != value:
            raise ValueError(
                f"{WORLDS[world]}.{key}={value}: {run_dir} has rows with {before['settings'][key]}; "
                "name another run.dir"
            )
    before["settings"] = now
    if before.setdefault("probe", list(probe)) != list(probe):
        raise ValueError(
            f"probe={probe.domain!r} after {probe.after}: {run_dir} has rows with {before['probe']}; "
            "name another run.dir"
        )
    for arm in arms:
        mark = fingerprint(arm.config)
        if before["arms"].setdefault(arm.name, mark) != mark:
            raise ValueError(f"arms: {run_dir} has rows of {arm.name} with other numbers; name another run.dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(saved, sort_keys=False), encoding="utf-8")


def fingerprint(config: schema.Config) -> str:
    """A hash over every key that enters a result, the length of the run included."""
    kept = {key: value for key, value in schema.flat(config).items() if not schema.covers(FREE, key)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def run(
    run_dir: Path,
    config: AblateConfig,
    world: ModuleType,
    settings: Any,
    arms: Sequence[Arm],
    probe: Probe,
    rows: Sequence[table.Row],
) -> list[table.Row]:
    """Runs what `rows` lack and appends it to RUN_DIR/ablate.csv as it finishes; the new rows."""
    done = {(row.regime, row.arm, row.seed) for row in rows if row.world == config.world}
    first = config.first_seed + getattr(settings, "first_seed", 0)  # policies are chosen on seeds of their own

    def missing(regime: str, arm: str) -> list[int]:
        return [seed for seed in range(first, first + config.seeds) if (regime, arm, seed) not in done]

    new = []
    found = iter(world.run(settings, arms, missing, run_dir=run_dir, probe=probe))
    for arm, group in itertools.groupby(found, key=lambda runs: runs.arm):
        print(f"{arm}:", end="", flush=True)
        for runs in group:
            more = table.rows_of(config.world, runs)
            table.append(run_dir / "ablate.csv", more)
            new += more
            if arm in config.pictures:
                plots.keep(run_dir / "curves" / config.world, runs)
            print(f" {runs.world}", end="", flush=True)
        print(flush=True)
    return new


def report(run_dir: Path, config: AblateConfig, rows: Sequence[table.Row]) -> None:
    """Prints the tables and the criteria of the world, and writes them, paired.csv and the pictures."""
    found = table.values(rows, config.world)
    text = criteria.tables(found, config.baselines)
    text += f"\n\ncriteria\n{criteria.criteria_text(criteria.criteria(found, config.judged))}"
    if held := criteria.probe_text(found):
        text += f"\n\ndecay of {config.probe} without practice\n{held}"
    print(text)
    for name in config.baselines:
        if name not in {arm for _, arm, _ in found}:
            print(f"note: baseline {name} was not run: nothing is compared with it")
    (run_dir / f"{config.world}.txt").write_text(text + "\n", encoding="utf-8")
    table.save_paired(run_dir / f"{config.world}-paired.csv", table.paired(found, config.baselines))
    plots.save(run_dir, config.world, found, config.pictures, config.baselines)
    print(f"ablation: {run_dir}")


if __name__ == "__main__":
    sys.exit(main())
