"""Weak scaling of a GRPO step on 1 to n devices: tokens a second a device, beside one device's.

    python -m benchmarks.scaling [--shapes qwen2_5_0_5b,qwen2_5_1_5b] [--layouts data,fsdp,fsdp_tensor] [--counts 1,2]
                                 [--prompts 32] [--group 8] [--prompt 256] [--new 256] [--out FILE] [--plot FILE.png]
    python -m benchmarks.scaling --read FILE ... --plot FILE.png      draws what earlier runs wrote

Random weights; every device adds --prompts prompts of --prompt tokens with --group completions of exactly --new tokens
each. Layouts: data (parameters on every device), fsdp (split over all), fsdp_tensor (tensor 2, the rest fsdp); all
sample with whole models on every device. Rollout tokens are the generated ones; a step's are those and the prompts',
once. Efficiency: tokens/s a device over that of one device alone. --counts: 0 = powers of two up to all devices.

Several processes, as launch/process_per_gpu.sh starts training's, are named by JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES, JAX_PROCESS_ID and JAX_LOCAL_DEVICE_IDS: then --counts is that of all devices. The first measures its
device alone while the others wait, and prints.
"""

import itertools
import json
import statistics
from pathlib import Path

import jax

from benchmarks import grpo_step
from benchmarks.measure import arguments, attempt, numbers, report
from sharding import exchange, multihost

SIZES = {"shapes": "qwen2_5_0_5b,qwen2_5_1_5b", "layouts": "data,fsdp,fsdp_tensor", "counts": "0", "prompts": 32}
SIZES |= {"group": 8, "prompt": 256, "new": 256, "microbatches": 1, "remat": "full", "attention": "auto"}
TINY = {"shapes": "tiny", "prompts": 2, "group": 2, "prompt": 8, "new": 8, "microbatches": 1}
OWN_PROCESS = ", a process each"
COLUMNS = ["shape", "layout", "devices", "rollout s", "score s", "update s", "step s", "rollout tokens/s a device"]
COLUMNS += ["step tokens/s a device", "rollout efficiency", "step efficiency", "not run"]


def sizes(layout: str, devices: int) -> dict[str, int]:
    if layout == "fsdp_tensor":
        return {"tensor": min(2, devices), "fsdp": max(1, devices // 2)}
    return {layout: devices}


def measure(given, shape: str, layout: str, count: int) -> list[float]:
    """Median seconds of rollout (with the weights' way to it), score, update and all; tokens/s a device of two."""
    devices = jax.devices()[:count]
    network = grpo_step.decoder(shape, devices[0], given.remat, given.attention)
    config = grpo_step.algorithm(given.prompts * count, given.group, given.prompt, given.new, given.microbatches)
    step, state = grpo_step.begin(config, network, grpo_step.mesh(devices, **sizes(layout, count)))
    times = []
    for number in range(given.repeats + 1):  # the first compiles
        clock = {}
        state, _ = grpo_step.learn(step, state, grpo_step.sample(step, state, number, clock), number, clock)
        times.append([clock["sync"] + clock["rollout"], clock["score"], clock["update"], sum(clock.values())])
    found = [statistics.median(column) for column in zip(*times[1:])]
    generated = given.prompts * given.group * given.new
    return [*found, generated / found[0], (generated + given.prompts * given.prompt) / found[3]]


def plot(rows: list[list], path: str) -> None:
    """Curves a shape and layout; dashed where each device has a process of its own. The axis does not begin at 0."""
    from matplotlib.figure import Figure

    figure = Figure((9, 4.5), layout="constrained")
    many = [row for row in rows if row[2] > 1]
    names = list(dict.fromkeys((row[0], row[1].removesuffix(OWN_PROCESS)) for row in many))
    for axes, column, title in zip(figure.subplots(1, 2, sharey=True), (9, 10), ("rollout", "whole step")):
        for shape, layout in dict.fromkeys((row[0], row[1]) for row in many):
            color = f"C{names.index((shape, layout.removesuffix(OWN_PROCESS)))}"
            points = [(row[2], row[column]) for row in many if tuple(row[:2]) == (shape, layout) and row[column]]
            style = {"linestyle": "--" if layout.endswith(OWN_PROCESS) else "-", "color": color, "marker": "."}
            axes.plot(*zip((1, 1.0), *sorted(points)), label=f"{shape} {layout}", **style)
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set(title=title, xlabel="devices", xticks=sorted({row[2] for row in rows}))
    axes.set_ylim(min([0.85, *(row[i] - 0.02 for row in many for i in (9, 10) if row[i])]), 1.02)
    figure.axes[0].set_ylabel("tokens/s a device, over one device's")
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)


def read(path: str) -> list[list]:
    """The rows that a run wrote; of several processes the layouts say so."""
    found = json.loads(Path(path).read_text())
    if found.get("processes", 1) == 1:
        return found["rows"]
    return [[shape, f"{layout}{OWN_PROCESS}", *row] for shape, layout, *row in found["rows"]]


def main() -> None:
    def also(parser):
        parser.add_argument("--plot", default="", help="PNG file for the curves")
        parser.add_argument("--read", nargs="*", default=[], help="draw what earlier runs wrote with --out, no more")

    given = arguments("benchmarks.scaling", __doc__, SIZES, TINY, also)
    if given.read:
        plot([row for path in given.read for row in read(path)], given.plot)
        return
    multihost.initialize(multihost.Given())
    counts = numbers(given.counts)
    if counts == [0]:
        counts = [2**power for power in range(jax.device_count().bit_length())]
    rows = []
    for shape in given.shapes.split(","):
        alone, why = attempt(lambda s=shape: measure(given, s, "data", 1)) if multihost.is_first() else (None, None)
        exchange.barrier(f"{shape} alone")
        rows.append([shape, "one device", 1, *(alone or [None] * 6), 1.0, 1.0, why])
        print(rows[-1], flush=True)
        for layout, count in itertools.product(given.layouts.split(","), [count for count in counts if count > 1]):
            found, why = attempt(lambda s=shape, lay=layout, c=count: measure(given, s, lay, c))
            shares = [found[i] / alone[i] for i in (4, 5)] if found and alone else [None] * 2
            rows.append([shape, layout, count, *(found or [None] * 6), *shares, why])
            print(rows[-1], flush=True)
    if multihost.is_first():
        report(given, {"processes": jax.process_count()}, COLUMNS, rows)
        if given.plot:
            plot(rows, given.plot)
    multihost.shutdown()


if __name__ == "__main__":
    main()
