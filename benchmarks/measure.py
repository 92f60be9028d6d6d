"""What the GPU benchmarks share: timing, tables, and one JSON file with everything that was measured."""

import argparse
import functools
import importlib.metadata
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np


def arguments(module: str, doc: str, sizes: dict[str, int | str], tiny: dict[str, int | str], also=None):
    """The parsed command line: one --flag a size, --tiny for a run on a CPU, --repeats and --out.

    tiny: the sizes that --tiny takes where a flag is not given. also(parser): adds further flags.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=doc.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a CPU with or without fake devices")
    parser.add_argument("--repeats", type=int, default=5, help="timings of which the median is taken")
    parser.add_argument("--out", type=Path, help="JSON file for all that was measured")
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=type(default), help=f"{default}; tiny: {tiny.get(name, default)}")
    if also is not None:
        also(parser)
    given = parser.parse_args()
    for name, default in sizes.items():
        key = name.replace("-", "_")
        if getattr(given, key) is None:
            setattr(given, key, tiny.get(name, default) if given.tiny else default)
    return given


def numbers(text: str) -> list[int]:
    """Sizes of a list such as "2k,4k,512"."""
    return [int(part[:-1]) * 1024 if part.endswith("k") else int(part) for part in text.split(",")]


def seconds(run: Callable, repeats: int, least: float = 0.05) -> float:
    """Median seconds of one `run`, which returns arrays; each timing is of as many runs as take `least` seconds."""
    return in_turns({"": timer(run, least)}, repeats)[""]


def timer(run: Callable, least: float) -> Callable[[], float]:
    """Compiles `run`, which returns arrays. Gives one timing: the seconds of a run, of as many as take `least`."""

    def timed(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            out = run()
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / calls

    timed(1)  # compiles
    return functools.partial(timed, enough(timed(1), least))


def enough(once: float, least: float) -> int:
    """Runs of `once` seconds each that take `least` seconds together."""
    return max(1, int(least / max(once, 1e-9)))


def in_turns(timers: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median of each over `repeats` rounds of all: what changes with the machine's warmth or load changes for all.

    A round goes 0, 1, -1, 2, -2, ..., one further on each time, and of an odd number every other round backwards. In as
    many rounds as there are timers (odd: twice that) each follows every other equally often (E. J. Williams, 1949).
    """
    names, found = list(timers), {name: [] for name in timers}
    steps = [(i + 1) // 2 if i % 2 else -i // 2 for i in range(len(names))]
    for turn in range(repeats):
        for step in steps[:: -1 if len(names) % 2 and turn % 2 else 1]:
            name = names[(turn + step) % len(names)]
            found[name].append(timers[name]())
    return {name: statistics.median(times) for name, times in found.items()}


def attempt(run: Callable):
    """(result, None), or (None, why not) where memory, a kernel or a package is missing: the others still run."""
    try:
        return run(), None
    except Exception as error:  # of any kind: a run on a lent machine is not thrown away for one of its rows
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return None, f"{type(error).__name__}: {lines[0][:160]}"


def relative(ours, theirs) -> float:
    """|ours - theirs| / |theirs|, not a number if any is none."""
    ours, theirs = (np.asarray(jax.device_get(x), np.float64) for x in (ours, theirs))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def normal(seed: int, dtype, *shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape, jnp.float32).astype(dtype) for key, shape in zip(keys, shapes)]


def machine() -> dict:
    device = jax.devices()[0]
    versions = {}
    for name in ("jax", "jaxlib", "torch", "nvidia-cudnn-cu13"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"device": device.device_kind, "devices": jax.device_count(), "versions": versions}


def table(columns: list[str], rows: list[list]) -> str:
    """Markdown; a float has three significant figures, None is a dash."""

    def cell(value) -> str:
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
        return "-" if value is None else str(value)

    lines = [columns, ["---"] * len(columns), *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(given: argparse.Namespace, found: dict, columns: list[str], rows: list[list]) -> None:
    """Prints the table, last, and writes everything to --out."""
    about = machine()
    if given.out:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        data = {"machine": about, "settings": settings, **found, "columns": columns, "rows": rows}
        given.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    print(f"\n{about['devices']} x {about['device']}, {versions}, median of {given.repeats}\n")
    print(table(columns, rows), flush=True)
