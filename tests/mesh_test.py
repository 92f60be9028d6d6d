"""Loss, gradients, rollout and whole steps on meshes of fake CPU devices are one device's; what moves between them.

pytest runs on one device, so the meshes live in child processes (this file run as a script), two at a time.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SIZES = {  # data, fsdp, seq, tensor
    "data8": (8, 1, 1, 1),
    "fsdp8": (1, 8, 1, 1),
    "fsdp4_tensor2": (1, 4, 1, 2),
    "data2_fsdp2_tensor2": (2, 2, 1, 2),
    "data2_seq4": (2, 1, 4, 1),
    "fsdp2_tensor2_seq2": (1, 2, 2, 2),
    "all_of_16": (2, 2, 2, 2),
    "tensor2": (1, 1, 1, 2),
    "data2_tensor2": (2, 1, 1, 2),
    "seq4_tensor2": (1, 1, 4, 2),
}
SIX = tuple(SIZES)[:6]
UNROLLED = ("fsdp4_tensor2", "fsdp2_tensor2_seq2")  # sampled from without a loop over the layers, on data 4, tensor 2
DEFAULT = {
    "llama": SIX,
    "qwen2": ("fsdp4_tensor2", "fsdp2_tensor2_seq2"),
    "qwen3": ("fsdp2_tensor2_seq2",),
    "gemma3": ("data2_fsdp2_tensor2", "fsdp2_tensor2_seq2"),
}
REST = {family: tuple(mesh for mesh in SIX if mesh not in meshes) for family, meshes in DEFAULT.items()}
REST |= {"llama": ("tensor2", "data2_tensor2", "seq4_tensor2")}
TOKENS = {"llama": 70}  # sampled a row, else 5: past 64 a split rollout asks not every time whether rows are done
V, E, D = 80, 32, 8  # numbers that no other dimension has, but for rows of 8 tokens
FAST = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # two thirds of the time to compile
)
if importlib.metadata.version("jaxlib") < "0.11":
    FAST += " --xla_cpu_use_fusion_emitters=false"  # and a third of that; later versions have no other way


def decoder_of(family: str):
    """Two layers or, with windows, three. qwen2 has one kv head, so that tensor splits its queries; qwen3 a head."""
    import transformers

    from models.architectures import from_hf

    shape = dict(vocab_size=V, hidden_size=E, intermediate_size=48, num_attention_heads=4, head_dim=D)
    shape |= dict(num_key_value_heads=1 if family == "qwen2" else 2, tie_word_embeddings=family != "qwen3")
    shape |= dict(num_hidden_layers=3 if family == "gemma3" else 2)
    gemma = dict(sliding_window=3, sliding_window_pattern=3, query_pre_attn_scalar=D) if family == "gemma3" else {}
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3": "Gemma3Text"}[family]
    return from_hf(getattr(transformers, f"{name}Config")(**shape, **gemma))


def relative(a, b) -> float:
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def make_batch(group: int, width: int, length: int):
    """16 rows behind prompts of 3, 5, 1 and 4 tokens: one leads its completion alone, one fills its room."""
    from infinite_jax.types import Batch

    rng, lengths = np.random.default_rng(0), np.repeat([3, 5, 1, 4], group)
    rows = len(lengths)
    slot = np.arange(length) - lengths[:, None]
    mask = (slot >= 0) & (slot < length - width) & ((slot == 0) | (rng.random((rows, length)) < 0.8))
    tokens = rng.integers(0, V, (rows, length)).astype(np.int32)
    tokens = np.where(slot < 0, tokens[np.arange(rows) // group * group], tokens)
    normal = lambda: rng.normal(size=(rows, length)).astype(np.float32) * 0.3  # noqa: E731
    old = normal() - 4
    weights = rng.random(rows).astype(np.float32), np.ones(rows, np.float32)
    return Batch(tokens, mask, old, old + 0.1 * normal(), old + normal(), normal() * 3, *weights)


def collectives(text: str, *kinds: str) -> list[tuple[int, ...]]:
    """Shapes that the collectives of some kinds give, in a compiled program."""
    found = []
    for line in text.splitlines():
        if match := re.search(rf" = (.*?) (?:{'|'.join(kinds)})(?:-start)?\(", line):
            found += [tuple(map(int, filter(None, s.split(",")))) for s in re.findall(r"\w\d+\[([\d,]*)\]", match[1])]
    return found


def compare(family: str, meshes, rank: int = 0) -> dict[str, dict]:
    """Per mesh, the largest difference from one device: relative for loss and gradients, absolute for the rollout.

    rank: of adapters, which then learn alone.
    """
    import dataclasses

    import jax

    from configs.cli import compose_config
    from infinite_jax import grpo
    from infinite_jax.placement import initial_train_state, place
    from infinite_jax.rollout import Sampling, generate, sync
    from infinite_jax.score import Scorer
    from models import lora, policy
    from models.architectures import LoraConfig
    from sharding.mesh import MeshConfig, build, make_rollout_mesh
    from sharding.rules import tree_shardings

    decoder = decoder_of(family)
    initial, adapters = jax.tree.map(lambda x: 4 * x, jax.device_get(policy.init(decoder, jax.random.key(0)))), None
    if rank:
        decoder = dataclasses.replace(decoder, lora=LoraConfig(rank, 2.0 * rank, tuple(lora.TARGETS)))
        draw = np.random.default_rng(2).normal
        adapters = jax.tree.map(lambda x: draw(size=x.shape).astype(np.float32) * 0.1, lora.abstract_params(decoder))
    config = compose_config("config", None, []).algorithm
    config = dataclasses.replace(config, group_size=4, kl_type="loss", kl_estimator="k3_is", kl_coef=0.1)
    width, length = 5, 12
    batch, scorer = make_batch(4, width, length), Scorer(decoder, 1.0, length - width, 4)
    rng, sampling = np.random.default_rng(1), Sampling(1.0, 0, 1.0, TOKENS.get(family, 5), 2, (1,), 0)
    prompts = rng.integers(2, V, (8, 6)).astype(np.int32), np.array([6, 5, 4, 3, 6, 2, 1, 6], np.int32)

    def results(sizes, unrolled=False):
        devices = jax.devices()[: int(np.prod(sizes))]
        mesh = build(sizes, devices)
        rollout_mesh = make_rollout_mesh(MeshConfig(*sizes, 0, 0, "none"), mesh, devices)
        params, base = jax.device_put(initial, tree_shardings(mesh, policy.logical_axes(decoder), initial)), None
        if rank:
            base, axes = params, lora.logical_axes(decoder)
            params = jax.device_put(adapters, tree_shardings(mesh, axes, adapters))

        def loss_and_grad(base, *inputs):
            return grpo.loss_and_grad(config, scorer.over(base), *inputs)

        with jax.set_mesh(mesh):
            inputs = base, params, jax.tree.map(lambda x: place(mesh, x), batch)
            step = jax.jit(loss_and_grad).lower(*inputs).compile()
            loss, _, grads = step(*inputs)
        with jax.set_mesh(rollout_mesh):
            sampler = dataclasses.replace(decoder, unrolled=unrolled)
            weights = sync(sampler, lora.join(decoder, base, params), rollout_mesh)
            inputs = weights, *(place(rollout_mesh, x) for x in prompts), jax.random.key(0)
            sample = generate.lower(sampler, sampling, *inputs).compile()
            made = sample(*inputs)
        moments = jax.tree.leaves(initial_train_state(config, decoder, params, mesh).opt_state)
        split = min(x.addressable_shards[0].data.size / x.size for x in moments if x.ndim > 1)
        return jax.device_get((loss, grads, made)), step.as_text(), sample.as_text(), split

    (loss, grads, made), *_ = results((1, 1, 1, 1))
    assert abs(float(loss)) > 1e-3 and len(set(made.tokens_BT.ravel())) > V / 2
    report = {}
    for name in meshes:
        (loss_m, grads_m, made_m), step, sample, split = results(SIZES[name], name in UNROLLED)
        gathered = collectives(step, "all-gather")
        moved = gathered + collectives(step, "all-to-all", "collective-permute")
        report[name] = {
            "loss": abs(float(loss_m - loss)) / abs(float(loss)),
            "grad": max(relative(a, b) for a, b in zip(jax.tree.leaves(grads_m), jax.tree.leaves(grads))),
            "tokens_differ": int((made_m.tokens_BT != made.tokens_BT).sum()),
            "rollout_logp": float(np.abs(made_m.logp_BT - made.logp_BT).max()),
            "smallest_moment_share": split,
            "logits_moved": [s for s in moved if len(s) > 2 and s[-1] in (V, V // 2)],
            "hidden_gathered": [s for s in gathered if len(s) == 3 and s[-1] == E],
            "keys_gathered": [s for s in gathered if len(s) == 4 and s[-1] == D and E not in s],
            "tables_reduced": [s for s in collectives(step, "all-reduce") if E in s and {V, V // 2} & set(s)],
            "weights_gathered_in_rollout": [s for s in collectives(sample, "all-gather") if E in s or 48 in s],
        }
    return report


SHOWN = ("reward/mean", "tokens/generated", "loss", "policy/grad_norm", "value/loss", "value/grad_norm")


def train(overrides: list[str], evaluate: bool = False) -> dict:
    """Three steps of the whole trainer: what came of them, and whether the third one compiled."""
    import jax

    from configs.cli import compose_config
    from infinite_jax.clock import CompilationCounter
    from infinite_jax.session import open_session

    lengths = ["algorithm.prompt_buckets=[64]", "algorithm.max_new_tokens=8", "algorithm.microbatches=2"]
    sizes = ["algorithm.prompts=4", "algorithm.group_size=4", "eval.prompts=2", "eval.batch=8", "eval.canary=false"]
    session, rows = open_session(compose_config("config", None, [*lengths, *sizes, *overrides])), []
    state, compilations = session.state, CompilationCounter()
    before = jax.tree.map(lambda x: x.sharding, state.train)
    for _ in range(3):
        compilations.since_last()
        state, outcome = session.trainer.step(state)
        rows.append({key: outcome.metrics[key] for key in SHOWN if key in outcome.metrics})
    late = compilations.since_last()
    pairs = zip(jax.tree.leaves_with_path(before), jax.tree.leaves(state.train), strict=True)
    moved = [f"{jax.tree_util.keystr(path)}: {a} -> {b.sharding}" for (path, a), b in pairs if a != b.sharding]
    found = session.evaluator.run(state.train.params) if evaluate else {}
    session.close()
    moments = (state.train.opt_state, state.train.critic and state.train.critic.opt_state)
    memories = {x.sharding.memory_kind for x in jax.tree.leaves(moments) if x.ndim}
    return {
        "rows": rows,
        "grades": {name: domain.greedy_N.tolist() for name, domain in found.items()},
        "compiled_in_third_step": late,
        "moved": moved,
        "moments_in": sorted(memories),
        "rollout_devices": [device.id for device in session.evaluator.mesh.devices.flat],
    }


def child(devices: int, jobs: list) -> subprocess.Popen:
    """Runs jobs, each [function, arguments...], in a process of so many devices."""
    flags = f"--xla_force_host_platform_device_count={devices} {FAST}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, json.dumps(jobs)]
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment, cwd=ROOT)


def result(process: subprocess.Popen) -> list:
    out, err = process.communicate()
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


RUNS = {
    "single": ["mesh=single"],
    # moments and reference wait on the host; the rollout is all data
    "colocated": [
        "mesh=single",
        "mesh.data=2",
        "mesh.fsdp=2",
        "mesh.tensor=2",
        "mesh.offload=both",
        "mesh.rollout_tensor=1",
    ],
    # four devices train, rows split over seq, and four sample
    "disjoint": ["mesh=single", "mesh.data=2", "mesh.seq=2", "mesh.rollout_devices=4"],
}


@pytest.fixture(scope="module")
def reports() -> dict:
    """Of each family by mesh."""
    halves = ("llama",), ("qwen2", "qwen3", "gemma3")
    children = [child(8, [["compare", name, DEFAULT[name]] for name in half]) for half in halves]
    return {name: found for half, each in zip(halves, children) for name, found in zip(half, result(each))}


@pytest.fixture(scope="module")
def runs() -> dict:
    children = {roles: child(8, [["train", RUNS[roles]]]) for roles in ("colocated", "disjoint")}
    return {roles: result(each)[0] for roles, each in children.items()}


def check(found: dict) -> None:
    assert found["loss"] < 1e-5 and found["grad"] < 1e-5, found
    assert found["tokens_differ"] == 0 and found["rollout_logp"] < 1e-5, found


@pytest.mark.parametrize("family, mesh", [(family, mesh) for family in DEFAULT for mesh in DEFAULT[family]])
def test_loss_gradients_and_rollout_are_one_devices(reports, family, mesh):
    check(reports[family][mesh])


@pytest.mark.parametrize("mesh", SIX)
def test_no_logits_move_and_sampling_gathers_no_weights(reports, mesh):
    found = reports["llama"][mesh]
    assert found["logits_moved"] == [] and found["weights_gathered_in_rollout"] == [], found


@pytest.mark.parametrize("mesh", [mesh for mesh in SIX if mesh != "data8"])
def test_the_gradient_of_the_vocabularys_table_is_scattered_where_it_is_summed(reports, mesh):
    assert reports["llama"][mesh]["tables_reduced"] == []


@pytest.mark.parametrize("mesh", ["data2_seq4", "fsdp2_tensor2_seq2"])
def test_rows_split_over_seq_are_never_brought_together(reports, mesh):
    found = reports["llama"][mesh]
    assert found["hidden_gathered"] == [] and found["keys_gathered"] == [], found


@pytest.mark.parametrize(
    "mesh, share", [("fsdp8", 1 / 8), ("fsdp4_tensor2", 1 / 8), ("data2_seq4", 1 / 4), ("fsdp2_tensor2_seq2", 1 / 8)]
)
def test_optimizer_moments_are_split_like_the_parameters(reports, mesh, share):
    assert reports["llama"][mesh]["smallest_moment_share"] == share


def same(found: dict, expected: dict) -> None:
    for a, b in zip(found["rows"], expected["rows"], strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6) and a["tokens/generated"] == b["tokens/generated"]
    assert found["grades"] == expected["grades"]


@pytest.mark.slow
def test_roles_on_all_devices_and_on_their_own_give_one_run(runs):
    same(runs["colocated"], runs["disjoint"])
    assert max(row["policy/grad_norm"] for row in runs["disjoint"]["rows"]) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("roles", ["colocated", "disjoint"])
def test_after_warm_up_nothing_compiles_and_every_split_is_as_it_was(runs, roles):
    """Another split, or the same in other words, would have every program of the next step compiled again."""
    assert runs[roles]["compiled_in_third_step"] == 0 and runs[roles]["moved"] == []


@pytest.mark.slow
def test_roles_lie_where_they_were_put(runs):
    colocated, disjoint = runs["colocated"], runs["disjoint"]
    assert colocated["moments_in"] == ["pinned_host"] and disjoint["moments_in"] == ["device"]
    assert colocated["rollout_devices"] == list(range(8)) and disjoint["rollout_devices"] == [4, 5, 6, 7]


@pytest.mark.slow
def test_runs_on_meshes_and_their_evaluations_are_one_devices():
    (single,) = result(child(1, [["train", RUNS["single"], True]]))
    for found in result(child(8, [["train", RUNS[roles], True] for roles in ("colocated", "disjoint")])):
        same(found, single)


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["head", "network"])
def test_a_critic_on_meshes_is_one_devices(critic):
    """Two updates a step; the critic's moments wait on the host with the actor's."""
    ppo = ["algorithm=ppo", f"algorithm.critic={critic}", "algorithm.minibatches=1", "algorithm.epochs=2"]
    (single,) = result(child(1, [["train", RUNS["single"] + ppo]]))
    runs = result(child(8, [["train", RUNS[roles] + ppo] for roles in ("colocated", "disjoint")]))
    assert single["rows"][2]["value/loss"] > 1e-3
    for found, memory in zip(runs, ("pinned_host", "device"), strict=True):
        same(found, single)
        assert found["moments_in"] == [memory] and found["compiled_in_third_step"] == 0 and found["moved"] == []


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in REST if REST[family]])
def test_the_other_meshes(family):
    (report,) = result(child(8, [["compare", family, REST[family]]]))
    for mesh in REST[family]:
        check(report[mesh])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_sixteen_devices(family):
    (report,) = result(child(16, [["compare", family, ["all_of_16"]]]))
    check(report["all_of_16"])


if __name__ == "__main__":
    print(json.dumps([{"compare": compare, "train": train}[name](*rest) for name, *rest in json.loads(sys.argv[1])]))
