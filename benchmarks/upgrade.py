"""Upgrades of one model M0 under several strategies: what the new domains gain, what the prior ones lose.

    python -m benchmarks.upgrade run OUT [--world tiny] [--seeds 0,1,2,3,4] [--arms none,kl,...] [--side N] [--cores N]
                                         [--gpus 0,1] [key=value ...]
    python -m benchmarks.upgrade table OUT [--world tiny] [--step N]      reads OUT/<arm>/<seed>/: tables, upgrade.png

For each seed M0 is trained on the prior domains, exported, and upgraded once an arm, every time by the commands a user
would give. Arms:

    none       the new domains alone, no KL                     kl         the new domains alone, KL to M0
    split      30 % prior domains, no KL                        all        both, and the new domains' ramp
    monitor    `all`, and the monitor acts                      lora       the new domains alone, adapters of rank 8
    rehearsal  `all`, but prior prompts come from M0 and        middle     weights halfway from M0 to `none`
               are graded by agreement with it;
    distilled  the same without a reward: the KL alone acts

Other prior prompts are drawn from the generators that M0 was trained with. The tables are of eval.prompts held-out
prompts a domain, greedy, the same before and after.
"""

import argparse
import json
import os
import queue
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from matplotlib.figure import Figure

from configs import cli, schema
from infinite_jax import heldout, record, statistics


class World(NamedTuple):
    base: str  # a configuration of configs/
    new: tuple[str, ...]  # of its domains, those that M0 is not trained on
    prompts: int  # a domain, of an evaluation
    steps_m0: int
    steps: int  # of an upgrade
    every: int  # steps between evaluations
    lora_rate: float  # learning rate of adapters, ten times that of all weights


WORLDS = {
    "tiny": World("config", ("shift", "count"), 1000, 60, 60, 10, 2e-3),
    "bench12": World("bench12", ("sums", "code_output", "tool_call"), 1000, 40, 40, 8, 2e-4),
}
PYTHON = [sys.executable, "-m"]
UNWATCHED = ("upgrade.watch=false", "upgrade.baseline=1")
ALONE = (*UNWATCHED, "upgrade.ramp_steps=0", "upgrade.split=false")
FREE, HELD = ("algorithm.kl_coef=0", "upgrade.least_kl=0"), ("algorithm.kl_coef=0.1",)
ARMS = {  # whether prior prompts are there, and what the command adds
    "none": (False, (*ALONE, *FREE)),
    "kl": (False, (*ALONE, *HELD)),
    "split": (True, (*UNWATCHED, "upgrade.ramp_steps=0", *FREE)),
    "all": (True, (*UNWATCHED, *HELD)),
    "monitor": (True, HELD),
    "rehearsal": (False, (*UNWATCHED, "upgrade.rehearsal=self", "upgrade.writing.reward=agreement", *HELD)),
    "distilled": (False, (*UNWATCHED, "upgrade.rehearsal=self", *HELD)),
    "lora": (False, (*ALONE, *FREE, "model.lora.rank=8")),
}
MIDDLE = "middle"
GAIN, LOSS = 0.05, 0.01  # the method's criterion: every new domain gains so much, no prior one loses more


def write_domains(out: Path, world: str) -> None:
    """OUT/configs/domains/: M0's domains, and all with and without prompts of the prior ones."""
    base, new, prompts, *_ = WORLDS[world]
    config = cli.compose_config(base, None, [])
    found = schema.as_dict(config)["domains"]
    for domain in found:
        domain["test"] = re.sub(r"size=\d+", f"size={4 * prompts}", domain["test"])
        domain["new"] = domain["name"] in new
    algorithm = config.algorithm
    lengths = {"prompt_buckets": list(algorithm.prompt_buckets), "max_new_tokens": algorithm.max_new_tokens}
    prior = [domain for domain in found if not domain["new"]]
    lost = [domain | {"eval_only": not domain["new"]} for domain in found]
    folder = out / "configs" / "domains"
    folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("prior", prior), ("kept", found), ("lost", lost)):
        text = "# @package _global_\n" + yaml.safe_dump({"domains": chosen, "algorithm": lengths}, sort_keys=False)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def commands_of_m0(given: argparse.Namespace, seed: int) -> list[list[str]]:
    steps = WORLDS[given.world].steps_m0
    folder = given.out / "m0" / str(seed)
    end = [f"run.dir={folder}", f"run.steps={steps}", f"run.eval_every={steps}", f"run.checkpoint_every={steps}"]
    train = [*PYTHON, "infinite_jax.train", *common(given, seed, "prior"), *end]
    return [train, [*PYTHON, "infinite_jax.export", str(folder), str(exported(given, seed))]]


def command_of_arm(given: argparse.Namespace, arm: str, seed: int) -> list[str]:
    world, (kept, added) = WORLDS[given.world], ARMS[arm]
    settings = [f"run.dir={given.out / arm / str(seed)}", f"run.steps={world.steps}", f"run.eval_every={world.every}"]
    settings += [f"run.checkpoint_every={world.steps}", f"model.path={exported(given, seed)}", *added]
    settings += [f"algorithm.learning_rate={world.lora_rate}"] if arm == "lora" else []
    return [*PYTHON, "infinite_jax.upgrade", *common(given, seed, "kept" if kept else "lost"), *settings]


def common(given: argparse.Namespace, seed: int, domains: str) -> list[str]:
    world = WORLDS[given.world]
    settings = [f"domains={domains}", f"run.seed={seed}", f"eval.prompts={world.prompts}", "eval.canary=false"]
    options = ["--config-name", world.base, "--config-dir", str((given.out / "configs").absolute())]
    return [*options, *settings, "contamination.policy=report", "mesh=single", *given.overrides]


def exported(given: argparse.Namespace, seed: int) -> Path:
    return given.out / "m0" / f"{seed}-hf"


def run(given: argparse.Namespace) -> None:
    """M0 of all seeds, then all arms of all seeds, --side commands at a time."""
    given.out.mkdir(parents=True, exist_ok=True)
    write_domains(given.out, given.world)
    seeds, arms = [int(seed) for seed in given.seeds.split(",")], given.arms.split(",")
    places = queue.SimpleQueue()  # of cores and a GPU, which a command has while it runs
    for place in range(given.side):
        places.put(place)

    def one(label: str, lines: list[list[str]]) -> None:
        place, start, code = places.get(), time.perf_counter(), 0
        env, front = dict(os.environ), []
        if given.cores:
            first = place * given.cores % os.cpu_count()
            front = ["taskset", "-c", f"{first}-{first + given.cores - 1}"]
        if given.gpus:
            gpus = given.gpus.split(",")
            env["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
        with (given.out / f"{label}.log").open("w", encoding="utf-8") as log:
            for line in lines:
                code = code or subprocess.run([*front, *line], stdout=log, stderr=subprocess.STDOUT, env=env).returncode
        places.put(place)
        print(f"{label}: exit {code} after {time.perf_counter() - start:.0f} s", flush=True)

    with ThreadPoolExecutor(given.side) as pool:
        missing = [seed for seed in seeds if not exported(given, seed).is_dir()]
        list(pool.map(lambda seed: one(f"m0-{seed}", commands_of_m0(given, seed)), missing))
        trained = [(seed, arm) for seed in seeds for arm in arms if arm != MIDDLE]
        list(pool.map(lambda x: one(f"{x[1]}-{x[0]}", [command_of_arm(given, x[1], x[0])]), trained))
        if MIDDLE in arms:
            line = [*PYTHON, "benchmarks.upgrade", "middle", str(given.out), "--world", given.world, "--seeds"]
            list(pool.map(lambda seed: one(f"{MIDDLE}-{seed}", [[*line, str(seed)]]), seeds))


def middle(out: Path, world: str, seed: int) -> None:
    """Evaluates the mean of M0's weights and those that `none` ended with (WiSE-FT, arXiv 2109.01903)."""
    import jax

    from infinite_jax import run_folder, session

    with cli.bad_input():
        folder = out / "none" / str(seed)
        opened = session.open_session(run_folder.load_config(folder, []))
    with opened:
        start = jax.tree.map(np.asarray, opened.state.train.params)
        abstract = run_folder.abstract(opened.state)
        _, state = run_folder.checkpoints(folder).restore(abstract)
        params = jax.tree.map(lambda a, b: ((a + np.asarray(b)) / 2).astype(a.dtype), start, state.train.params)
        results = opened.evaluator.run(jax.device_put(params, jax.tree.map(lambda x: x.sharding, state.train.params)))
        start_rates = next(row for row in evaluated(folder) if row["step"] == 0)
        rows = [start_rates, {"step": WORLDS[world].steps} | heldout.metrics(results)]
        target = out / MIDDLE / str(seed)
        target.mkdir(parents=True, exist_ok=True)
        (target / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def change(folder: Path, names: list[str], step: int) -> tuple[np.ndarray, np.ndarray] | None:
    """[D]: pass rates at the start, and what they have changed by at a step, on the same prompts; None if not run."""
    keys = [f"eval/pass_rate/{name}" for name in names]
    rows = {row["step"]: np.array([row[key] for key in keys]) for row in evaluated(folder)}
    return (rows[0], rows[step] - rows[0]) if rows.keys() >= {0, step} else None


def evaluated(folder: Path) -> list[dict]:
    return [row for row in record.read(folder / "metrics.jsonl") if "eval/macro" in row]


def table(out: Path, world: str, step: int) -> None:
    new = WORLDS[world].new
    listed = yaml.safe_load((out / "configs" / "domains" / "kept.yaml").read_text(encoding="utf-8"))["domains"]
    names = [domain["name"] for domain in listed]
    is_new = np.array([name in new for name in names])
    found = {}
    for arm in (*ARMS, MIDDLE):
        ended = [change(folder, names, step) for folder in sorted((out / arm).glob("*"))]
        found[arm] = [x for x in ended if x is not None]
    print("| arm | seeds | new, points | prior, mean | prior, worst | every new +5 | no prior -1 | both |")
    print("|---|---|---|---|---|---|---|---|")
    for arm, ended in found.items():
        if not ended:
            print(f"| {arm} | 0 | NOT RUN | | | | | |")
            continue
        change_SD = 100 * np.array([change_D for _, change_D in ended])
        gained, kept = (change_SD[:, is_new] >= 100 * GAIN).all(1), (change_SD[:, ~is_new] >= -100 * LOSS).all(1)
        columns = [change_SD[:, is_new].mean(1), change_SD[:, ~is_new].mean(1), change_SD[:, ~is_new].min(1)]
        counts = [f"{int(x.sum())} of {len(ended)}" for x in (gained, kept, gained & kept)]
        print(f"| {arm} | {len(ended)} | {' | '.join([*map(spread, columns), *counts])} |")
    print("\n| domain | M0 | " + " | ".join(arm for arm in found if found[arm]) + " |")
    print("|---|---|" + "---|" * sum(map(bool, found.values())))
    for d, name in enumerate(names):
        every = [before_D[d] for ended in found.values() for before_D, _ in ended]
        cells = [spread([change_D[d] for _, change_D in ended], 100) for ended in found.values() if ended]
        print(f"| {name}{', new' * bool(is_new[d])} | {np.mean(every):.3f} | {' | '.join(cells)} |")


def draw(out: Path, world: str) -> None:
    """OUT/upgrade.png: mean held-out rates of the new and of the prior domains over the steps, a line an arm."""
    figure = Figure((9, 3.5), layout="constrained")
    panels, new = figure.subplots(1, 2), WORLDS[world].new
    for arm in ARMS:
        curves = {}  # by kind: for each seed {step: rate}
        for folder in sorted((out / arm).glob("*")):
            rows = evaluated(folder)
            for kind in (True, False):
                rates = [
                    [v for k, v in row.items() if k.startswith("eval/pass_rate/") and (k.split("/")[-1] in new) == kind]
                    for row in rows
                ]
                curves.setdefault(kind, []).append({row["step"]: np.mean(r) for row, r in zip(rows, rates)})
        for axis, kind in zip(panels, (True, False)):
            found = curves.get(kind, [])
            steps = sorted(set.intersection(*map(set, found))) if found else []
            axis.plot(steps, [np.mean([curve[step] for curve in found]) for step in steps], marker=".", label=arm)
    for axis, title in zip(panels, ("new domains", "prior domains")):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("held-out pass rate, mean")
    panels[1].legend(fontsize=8)
    figure.savefig(out / "upgrade.png", dpi=110)


def spread(values, scale: float = 1) -> str:
    """Mean and half of the 95 % t interval over seeds."""
    values = scale * np.asarray(values)
    interval = statistics.t_interval(values)
    return f"{values.mean():+.1f}" + (f" ±{interval.high - interval.mean:.1f}" if interval else "")


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.upgrade", description=__doc__.splitlines()[0])
    arguments.add_argument("verb", choices=("run", "middle", "table"))
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--world", choices=WORLDS, default="tiny")
    arguments.add_argument("--seeds", default="0,1,2,3,4")
    arguments.add_argument("--arms", default=",".join((*ARMS, MIDDLE)))
    arguments.add_argument("--side", type=int, default=1, help="commands at a time")
    arguments.add_argument("--cores", type=int, default=0, help="cores of each; 0 = as the system places them")
    arguments.add_argument("--gpus", default="", help="GPUs that the commands take in turn; empty = as they find them")
    arguments.add_argument("--step", type=int, default=0, help="that the tables are of; 0 = the last")
    arguments.add_argument("overrides", nargs="*", metavar="key=value")
    given = arguments.parse_intermixed_args()
    if given.verb == "run":
        run(given)
    elif given.verb == "middle":
        for seed in given.seeds.split(","):
            middle(given.out, given.world, int(seed))
    else:
        table(given.out, given.world, given.step or WORLDS[given.world].steps)
        draw(given.out, given.world)


if __name__ == "__main__":
    main()
