"""The longest row that trains on 1..n devices, its tokens split over all of them; and a whole GRPO step on long rows.

    python -m benchmarks.context [--shape qwen2_5_0_5b] [--least 64k] [--most 1024k] [--counts 1,2] [--out FILE]
    python -m benchmarks.context --step --shape qwen2_5_1_5b [--prompt 14k] [--new 2k] [--prompts 1] [--group 4]
    python -m benchmarks.context --topology H200:2   compiles for GPUs that are not there

Longest row: one row of random tokens, an eighth of it prompt, mixed-precision AdamW, a reference, layers recomputed.
Its length is doubled as long as the update, compiled, fits the memory of a device; then real steps are taken, from the
longest of at most --train tokens on down until one goes through. --step: rollout, scores and update of --prompts x
--group rows of --prompt + --new tokens, mesh.seq = all devices.
"""

import jax

from benchmarks import grpo_step, topology
from benchmarks.measure import arguments, attempt, numbers, report
from infinite_jax.planning import programs
from infinite_jax.planning.memory import cast_weights
from sharding.mesh import build

SIZES = {"shape": "qwen2_5_0_5b", "least": "64k", "most": "1024k", "train": "1024k", "counts": "0", "memory": 0}
SIZES |= {"prompt": "14k", "new": "2k", "prompts": 1, "group": 4, "microbatches": 1, "remat": "full"}
SIZES |= {"attention": "auto"}
TINY = {"shape": "tiny", "least": "64", "most": "512", "memory": 24 * 2**20, "prompt": "32", "new": "16", "group": 2}
USABLE = 0.95  # of a device that is not there: what XLA_PYTHON_CLIENT_MEM_FRACTION=.95 leaves
COLUMNS = ["shape", "devices", "tokens that fit", "compiled GB a device", "of GB", "tokens trained", "s a step"]
COLUMNS += ["tokens/s a device", "note"]
STEP_COLUMNS = ["shape", "devices", "rows", "prompt", "new", "rollout s", "score s", "update s", "step s"]
STEP_COLUMNS += ["update tokens/s a device", "loss is finite", "not run"]


def one_row(length: int):
    return grpo_step.algorithm(1, 1, length // 8, length - length // 8)


def compiled_bytes(network, devices, length: int) -> int:
    """Of a device, at the peak of the update of one row: state, reference, batch and temporaries."""
    mesh = build((1, 1, len(devices), 1), list(devices))
    program = programs.compile_update(one_row(length), network, mesh, "none")
    print(f"{length} tokens on {len(devices)}: compiled in {program.seconds:.0f} s", flush=True)
    return program.arguments + program.outputs + program.temporaries + program.code + cast_weights(network, mesh)


def memory(given, device) -> int:
    """Bytes that a program may use of a device."""
    limit = given.memory or (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:
        raise ValueError(f"the memory of {device.device_kind} is unknown: give --memory in bytes")
    return limit


def take_steps(given, network, devices, length: int) -> tuple[float, bool]:
    """Seconds of the second step on one row, and whether its loss is finite."""
    step, state = grpo_step.begin(one_row(length), network, grpo_step.mesh(devices, seq=len(devices)))
    for number in range(2):
        clock = {}
        state, metrics = grpo_step.learn(step, state, grpo_step.random_rollout(step, number), number, clock)
    return sum(clock.values()), bool(jax.numpy.isfinite(metrics["loss"]))


def longest(given, devices, limit: int, run: bool) -> list:
    """A row of the table for so many devices."""
    network = grpo_step.decoder(given.shape, devices[0], given.remat, given.attention)
    length, most, fitting, note = numbers(given.least)[0], numbers(given.most)[0], {}, None
    while length <= most:
        wanted, note = attempt(lambda n=length: compiled_bytes(network, devices, n))
        print(f"{length} tokens: {wanted and wanted / 1e9:.4g} GB of {limit / 1e9:.4g}, {note}", flush=True)
        if wanted is None or wanted > limit:
            break
        fitting[length], length = wanted, 2 * length
    if not fitting:
        return [given.shape, len(devices), None, None, limit / 1e9, None, None, None, note or "nothing fits"]
    row = [given.shape, len(devices), max(fitting), fitting[max(fitting)] / 1e9, limit / 1e9]
    note = "the longest that was tried" if max(fitting) * 2 > most else note
    for length in sorted(fitting, reverse=True) if run else ():
        if length > numbers(given.train)[0]:
            continue
        found, why = attempt(lambda n=length: take_steps(given, network, devices, n))
        if found:
            note = note if found[1] else "the loss is not finite"
            return [*row, length, found[0], length / found[0] / len(devices), note]
        note = f"{length} tokens fitted as compiled but: {why}"
        print(note, flush=True)
    return [*row, None, None, None, note if run else "compiled only"]


def whole_step(given, devices) -> list:
    prompt, new = numbers(given.prompt)[0], numbers(given.new)[0]
    network = grpo_step.decoder(given.shape, devices[0], given.remat, given.attention)
    config = grpo_step.algorithm(given.prompts, given.group, prompt, new, given.microbatches)
    step, state = grpo_step.begin(config, network, grpo_step.mesh(devices, seq=len(devices)))
    for number in range(2):  # the first compiles
        clock = {}
        rollout = grpo_step.sample(step, state, number, clock)
        state, metrics = grpo_step.learn(step, state, rollout, number, clock)
        print(clock, flush=True)
    rows = given.prompts * given.group
    trained = (given.prompts * prompt + rows * new) / clock["update"] / len(devices)
    times = clock["sync"] + clock["rollout"], clock["score"], clock["update"], sum(clock.values())
    finite = bool(jax.numpy.isfinite(metrics["loss"]))
    return [given.shape, len(devices), rows, prompt, new, *times, trained, finite, None]


def main() -> None:
    def also(parser):
        parser.add_argument("--step", action="store_true", help="a whole GRPO step instead of the longest row")
        parser.add_argument("--topology", default="", help="compile for H100:n or H200:n instead of running here")

    given = arguments("benchmarks.context", __doc__, SIZES, TINY, also)
    devices, limit = jax.devices(), None
    if given.topology:
        devices, size = topology.devices(given.topology)
        limit = given.memory or int(USABLE * size)
    counts = numbers(given.counts)
    if counts == [0]:
        counts = [2**power for power in range(len(devices).bit_length())]
    rows = []
    for count in counts if not given.step else [max(counts)]:
        if given.step:
            found, why = attempt(lambda c=count: whole_step(given, devices[:c]))
            rows.append(found or [given.shape, count, *[None] * 9, why])
        else:
            bound = limit or memory(given, devices[0])
            rows.append(longest(given, devices[:count], bound, run=not given.topology))
        print(rows[-1], flush=True)
    report(given, {}, STEP_COLUMNS if given.step else COLUMNS, rows)


if __name__ == "__main__":
    main()
