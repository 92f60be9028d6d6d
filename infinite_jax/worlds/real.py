"""world=real: arms x seeds through the ordinary trainer, compared at equal generated tokens.

A regime is a file of configs/domains (real.domains; none = the run's own domains). Every run ends at the step that
brings its generated tokens to run.tokens, whatever the number of steps (run.steps bounds it too); all measures are over
the axis of generated tokens. Discarded rollouts of dynamic sampling are generated tokens like others.

A run's folder is RUN_DIR/real/<regime>/<arm>/<seed>. One whose metrics.jsonl reaches the bound is read and not run
again, so that results measured elsewhere can be put in place; one that does not is begun anew. Model and rows are read
once a regime, and what is static is compiled once: a second run in the process costs its steps.

Left out: checkpoints (a run is short; what resumes is the ablation).
"""

import dataclasses
import functools
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import yaml

from configs import cli, limits, schema
from configs.schema import Config
from infinite_jax import decay, gate, record, retention, run_folder
from infinite_jax.session import assemble, load, set_up_runtime
from infinite_jax.train import train
from infinite_jax.worlds.table import NO_PROBE, Arm, Probe, Runs

OWN = "own"  # the regime of the run's own domains
# Keys that say where a run happens and enter no result (the weights under model.path are not compared).
PLACE = ("run.dir", "run.name", "run.checkpoint_every", "run.keep_last", "run.keep_best", "model.path", "mesh")


@dataclass(frozen=True)
class Settings:
    """The section `real` of configs/ablate.yaml. Raises ValueError on an impossible value."""

    FREE = ("seconds",)  # chooses what is run, enters no result

    domains: tuple[str, ...]  # files of configs/domains, a regime each; none = the run's own domains
    seconds: float  # no run begins after so many; 0 = all run

    def __post_init__(self):
        if self.seconds < 0:
            raise ValueError(f"real.seconds={self.seconds}: must be at least 0 (0 = all run)")


def run(
    settings: Settings,
    arms: Sequence[Arm],
    missing: Callable[[str, str], list[int]],
    run_dir: Path,
    probe: Probe = NO_PROBE,
) -> Iterator[Runs]:
    """Yields each run as it finishes: all arms on a seed before the next seed, so that what is done can be compared."""
    began, cache = time.perf_counter(), {}
    with cli.bad_input():
        units = plan(settings, arms, missing, run_dir, probe)
    for regime, name, seed, folder, config in units:
        if not finished(folder, config):
            if settings.seconds and time.perf_counter() - began > settings.seconds:
                continue
            once(cache, config, folder, seed)
        yield read(regime, name, seed, folder, config, probe.domain)


def check(settings: Settings, arms: Sequence[Arm], probe: Probe) -> None:
    """Raises ValueError, one line, on what cannot be run."""
    for regime in settings.domains or (OWN,):
        for arm in arms:
            limits.validate(withhold(in_regime(arm, regime), probe), jax.device_count())


Unit = tuple[str, str, int, Path, Config]  # regime, arm, seed, the run's folder and configuration


def plan(
    settings: Settings,
    arms: Sequence[Arm],
    missing: Callable[[str, str], list[int]],
    run_dir: Path,
    probe: Probe,
) -> list[Unit]:
    """The runs that are missing, in order. Raises ValueError, one line, on what was run otherwise."""
    units = []
    for regime in settings.domains or (OWN,):
        for arm in arms:
            config = withhold(in_regime(arm, regime), probe)
            place = run_dir / "real" / regime / re.sub(r"[^\w.=-]+", "_", arm.name)
            units += [(regime, arm.name, seed, place / str(seed), config) for seed in missing(regime, arm.name)]
    for *_, seed, folder, config in units:
        if finished(folder, config):
            same_settings(folder, config, seed)
    return sorted(units, key=lambda unit: unit[2])  # a stable sort: within a seed in the order above


@functools.cache  # composed once, though asked for to check and to plan
def in_regime(arm: Arm, regime: str) -> Config:
    """The arm's configuration with the regime's domains. Raises ValueError, one line, where there is no such file."""
    return schema.located(arm.config if regime == OWN else arm.compose([f"domains={regime}"]))


def withhold(config: Config, probe: Probe) -> Config:
    """`config` with the probe's domain retired in the midst. Raises ValueError, one line, where there is none such."""
    if not probe.domain:
        return config
    trained = [domain.name for domain in config.domains if not domain.eval_only]
    if probe.domain not in trained:
        raise ValueError(
            f"probe={probe.domain}: not a domain that is trained on; {schema.nearest(probe.domain, trained)}"
        )
    after = probe.ends(config.run.steps, "run.steps")
    domains = [
        dataclasses.replace(domain, retires=after) if domain.name == probe.domain else domain
        for domain in config.domains
    ]
    return dataclasses.replace(config, domains=tuple(domains))


def once(cache: dict, config: Config, folder: Path, seed: int) -> None:
    """One run from the start to its bound."""
    if folder.exists():
        shutil.rmtree(folder)
    changes = dict(seed=seed, dir=str(folder), checkpoint_every=0)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, **changes))
    key = (config.model, config.domains, config.mesh, config.algorithm.prompt_buckets)
    key += (config.curriculum.difficulty, config.contamination)
    if key not in cache:
        cache.clear()
        set_up_runtime(config)
        screened = gate.screen(config)
        if screened.halted:
            gate.write(folder / gate.FOLDER, screened)
            raise SystemExit(cli.HALTED)
        loaded, params = load(config, screened.domains)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
        cache[key] = loaded, jax.device_get(params), shardings, screened  # on the host: a run's steps donate its copy
    loaded, params, shardings, screened = cache[key]
    gate.write(folder / gate.FOLDER, screened)
    session = assemble(config, loaded, jax.device_put(params, shardings))
    run_folder.save_config(folder, config, session.data_sha256)
    with session:
        if code := train(session._replace(state=None), folder, session.state):
            raise SystemExit(code)  # stopped by a signal


def finished(folder: Path, config: Config) -> bool:
    rows = record.read(folder / record.METRICS)
    if not rows or "eval/macro" not in rows[-1]:
        return False
    return rows[-1]["step"] >= config.run.steps or 0 < config.run.tokens <= rows[-1]["tokens/total"]


def same_settings(folder: Path, config: Config, seed: int) -> None:
    """Raises ValueError, one line, where the finished run in `folder` was one of other settings."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{folder}: no config.yaml beside its metrics: remove the folder, or put the file back")
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    saved = schema.flat(schema.build(Config, {key: data[key] for key in data if key not in ("provenance", "changes")}))
    wanted = schema.flat(config) | {"run.seed": seed}
    for key, value in wanted.items():
        if not schema.covers(PLACE, key) and saved[key] != value:
            raise ValueError(
                f"{path}: {key}={saved[key]!r}, wanted {value!r}: remove the folder, or name another run.dir"
            )


def read(regime: str, arm: str, seed: int, folder: Path, config: Config, probe: str = "") -> Runs:
    """A finished run as the table wants it; `probe`: the domain that was withheld."""
    rows = record.read(folder / record.METRICS)
    evaluations = retention.from_rows(rows, config.domains, axis="tokens/total")
    names = [domain.name for domain in config.domains]
    share_TD = np.array([[row[f"triage/share/{name}"] for name in names] for row in rows[1:]], np.float32)
    cost = {"tokens": float(rows[-1]["tokens/total"]), "steps": float(rows[-1]["step"])}
    cost["seconds"] = sum(row.get("time/step_s", 0.0) + row.get("time/evaluate_s", 0.0) for row in rows)
    gains = {f"gain/{name}": rate - first for name, first, rate in zip(names, *evaluations.rate_KD[[0, -1]])}
    extra = {key: np.array([value]) for key, value in gains.items() if np.isfinite(value)}
    decays = ()
    if probe:
        d = names.index(probe)
        ended = next((row["tokens/total"] for row in rows if row["step"] == config.domains[d].retires), np.inf)
        decays = (decay.decay(evaluations.at_K, evaluations.rate_KD[:, d], ended),)
    return Runs(regime, arm, np.array([seed]), [evaluations], share_TD[None], cost, extra, decays)
