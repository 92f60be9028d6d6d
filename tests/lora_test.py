"""Adapters against transformers' torch models, whose weights are changed by hand, and what they promise of a run.

What peft would load is checked from the exported files alone, under peft's names: W + alpha / rank B A.
"""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers
from hf_test import TOKENS, reload_in_torch, torch_logits, torch_model
from mesh_test import RUNS, check, child, result, same

from configs import limits
from configs.cli import compose_config
from configs.schema import located
from infinite_jax import evaluate, export, record, resume, run_folder, session, train
from infinite_jax.checkpoint import Checkpointer
from infinite_jax.placement import abstract_train_state
from infinite_jax.planning import memory, roofline
from infinite_jax.progress import results_table
from infinite_jax.rollout import sync
from infinite_jax.score import Scorer
from infinite_jax.types import Roles
from models import hf, lora, lora_folder, policy, source
from models.architectures import LoraConfig, from_hf
from sharding.mesh import build

ALL = LoraConfig(3, 7.5, tuple(lora.TARGETS))
logits = jax.jit(policy.logits, static_argnums=0)
merge = jax.jit(lora.merge, static_argnums=0)


def random_adapters(config, seed=0, scale=0.2):
    rng = np.random.default_rng(seed)
    shapes = lora.abstract_params(config)
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32), shapes)


def change_by_hand(model, folder):
    """The torch model with what a peft folder says added to its weights."""
    import torch

    settings = json.loads((folder / lora_folder.CONFIG).read_text())
    factors = safetensors.numpy.load_file(folder / lora_folder.WEIGHTS)
    weights = dict(model.named_parameters())
    for name in [name for name in factors if ".lora_A." in name]:
        a, b = factors[name], factors[name.replace(".lora_A.", ".lora_B.")]
        assert a.shape[0] == b.shape[1] == settings["r"] and name.split(".")[-3] in settings["target_modules"]
        weight = weights[name.removeprefix("base_model.model.").replace(".lora_A.", ".")]
        with torch.no_grad():
            weight += torch.tensor(settings["lora_alpha"] / settings["r"] * b @ a)
    return len(factors)


@pytest.mark.parametrize(
    "case, targets",
    [
        ("qwen2", ALL.targets),
        pytest.param("qwen3", ("v", "q", "up"), marks=pytest.mark.slow),
        pytest.param("llama-tied", ("o",), marks=pytest.mark.slow),
        pytest.param("gemma3", ALL.targets, marks=pytest.mark.slow),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_logits_are_those_of_a_torch_model_changed_by_hand(case, targets, tmp_path):
    """With adapters beside the weights, merged, and read back by transformers from the exported folder."""
    model = torch_model(case)
    model.save_pretrained(tmp_path / "base")
    before = torch_logits(model)
    config, base = hf.load(tmp_path / "base", jnp.float32)
    config = dataclasses.replace(config, lora=dataclasses.replace(ALL, targets=tuple(targets)))
    adapters = random_adapters(config)
    lora_folder.save(config, adapters, tmp_path / "adapter", "base")
    assert change_by_hand(model, tmp_path / "adapter") == 2 * config.num_layers * len(targets)
    expected = torch_logits(model)
    assert np.abs(expected - before).max() > 0.3
    joined = lora.join(config, base, adapters)
    np.testing.assert_allclose(logits(config, joined, TOKENS), expected, atol=2e-4)
    merged = merge(config, joined)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    np.testing.assert_allclose(logits(config, merged, TOKENS), expected, atol=2e-4)
    hf.save(config, merged, tmp_path / "ours")
    np.testing.assert_allclose(torch_logits(reload_in_torch(tmp_path / "ours")), expected, atol=2e-4)


def small(**changes):
    shape = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True)
    return dataclasses.replace(from_hf(transformers.LlamaConfig(**shape | changes)), lora=ALL)


def random_base(config):
    """Norms at 1, matrices large enough to matter; without the time that flax takes to make them."""
    rng = np.random.default_rng(5)

    def draw(path, x):
        noise = 0.2 * rng.normal(size=x.shape)
        return jnp.asarray(noise + path[-1].key.endswith("norm"), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, policy.abstract_params(config))


def test_a_policy_begins_as_its_base():
    """To the bit; A is uniform within 1 / sqrt(in), as peft draws it, each layer's and target's own."""
    config = small()
    base = random_base(config)
    start = jax.jit(lora.init, static_argnums=0)(config, jax.random.key(1))
    tokens = np.random.default_rng(0).integers(0, 61, (2, 9))
    joined = lora.join(config, base, start)
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(lambda x: x.shape, lora.abstract_params(config))
    np.testing.assert_array_equal(logits(config, joined, tokens), logits(config, base, tokens))
    for a, b in zip(jax.tree.leaves(merge(config, joined)), jax.tree.leaves(base), strict=True):
        np.testing.assert_array_equal(a, b)
    layers = start["layers"]
    for name, size in (("q_a", 32), ("o_a", 32), ("down_a", 48)):
        bound = 1 / math.sqrt(size)
        assert 0.9 * bound < np.abs(layers[name]).max() <= bound
        assert np.std(layers[name]) == pytest.approx(bound / math.sqrt(3), rel=0.15)
    assert not np.array_equal(layers["q_a"][0], layers["q_a"][1])
    assert not np.array_equal(layers["q_a"], layers["k_a"])
    again = jax.jit(lora.init, static_argnums=0)(config, jax.random.key(2))
    assert not np.array_equal(layers["q_a"], again["layers"]["q_a"])


def dot_sizes(jaxpr) -> set[int]:
    """Sizes of all that matrix products give, in loops and nested calls too."""
    sizes = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            sizes |= {out.aval.size for out in eqn.outvars}
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    sizes |= dot_sizes(inner)
    return sizes


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_gradients_are_the_chain_rules_and_none_is_as_large_as_a_weight(remat):
    """Of the dense gradient G at W + s A B: dA = s G B^T, dB = s A^T G."""
    config = dataclasses.replace(small(), remat=remat)
    base, adapters = random_base(config), random_adapters(config)
    tokens = np.random.default_rng(0).integers(0, 61, (3, 7))

    def loss(params):
        return jnp.mean(jax.nn.logsumexp(3 * policy.logits(config, params, tokens), axis=-1))

    thin = jax.jit(jax.grad(lambda adapters, base: loss(lora.join(config, base, adapters))))
    found = thin(adapters, base)
    assert jax.tree.structure(found) == jax.tree.structure(adapters)
    dense = jax.jit(jax.grad(loss))
    layers, scale = dense(merge(config, lora.join(config, base, adapters)))["layers"], 7.5 / 3
    place = {"q": np.s_[..., :2, :], "k": np.s_[..., 2:3, :], "v": np.s_[..., 3:, :]}
    place |= {"gate": np.s_[..., :1, :], "up": np.s_[..., 1:, :], "o": np.s_[...], "down": np.s_[...]}
    for leaf, names in lora.PARTS.items():
        for name in names:
            a, b = (np.asarray(adapters["layers"][f"{name}_{factor}"]) for factor in "ab")
            matrix_a, matrix_b = a.reshape(2, -1, 3), b.reshape(2, 3, -1)
            matrix = np.asarray(layers[leaf])[place[name]].reshape(2, matrix_a.shape[1], matrix_b.shape[2])
            expected_a = scale * np.einsum("lio,lro->lir", matrix, matrix_b)
            expected_b = scale * np.einsum("lir,lio->lro", matrix_a, matrix)
            for factor, expected in (("a", expected_a), ("b", expected_b)):
                got = np.asarray(found["layers"][f"{name}_{factor}"]).reshape(expected.shape)
                np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())
    weights = {base["layers"][leaf][0].size for leaf in lora.PARTS} | {base["embed"].size}
    assert not weights & dot_sizes(jax.make_jaxpr(thin)(adapters, base).jaxpr)
    assert weights <= dot_sizes(jax.make_jaxpr(dense)(base).jaxpr)  # the same look finds those of a dense gradient


def test_bfloat16_bases_keep_their_dtype_and_adapters_are_float32():
    config = dataclasses.replace(small(), dtype="bfloat16")
    base = policy.cast(config, random_base(config))
    joined = lora.join(config, base, random_adapters(config))
    merged = merge(config, joined)
    assert jax.tree.map(lambda x: x.dtype, merged) == jax.tree.map(lambda x: x.dtype, base)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), joined)
    for leaf in lora.PARTS:  # rounded once, from a sum in float32
        expected = merge(config, wide)["layers"][leaf].astype(jnp.bfloat16)
        np.testing.assert_array_equal(merged["layers"][leaf], expected)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 9))
    exact = logits(dataclasses.replace(config, dtype="float32"), wide, tokens)
    assert np.linalg.norm(logits(config, joined, tokens) - exact) < 0.02 * np.linalg.norm(exact)


def test_sampling_reads_weights_of_the_bases_shape_and_a_whole_policy_needs_no_join():
    config, mesh = small(), build((1, 1, 1, 1))
    state = abstract_train_state(compose_config("config", None, []).algorithm, config, mesh)
    base = jax.device_put(random_base(config), jax.tree.leaves(state.params)[0].sharding)
    joined = lora.join(config, base, random_adapters(config))
    synced = sync(config, joined, mesh)
    assert jax.tree.structure(synced) == jax.tree.structure(base) and not lora.adapted(synced)
    assert lora.join(config, base, base) is base and lora.join(config, None, base) is base
    assert sync(config, base, mesh) is base  # no copy, as ever
    for name, leaf in base["layers"].items():
        assert joined["layers"][name] is leaf


def test_the_number_of_parameters_that_learn_is_the_published_one():
    """peft prints 4,399,104 for Qwen2.5-0.5B at rank 8 on all linear layers."""
    config = compose_config("config", None, ["model=qwen2_5_0_5b", "model.lora.rank=8", "mesh=single"])
    decoder = source.network(config.model)
    assert memory.num_trained(decoder) == 4_399_104 and memory.num_parameters(decoder) == 494_032_768


@pytest.mark.parametrize("critic", ["none", "head"])
def test_a_plan_counts_the_state_that_training_has(critic):
    judged = [] if critic == "none" else ["algorithm.advantage=gae", f"algorithm.critic={critic}"]
    lengths = ["model=qwen2_5_0_5b", "model.lora.rank=8", "mesh=single", *judged]
    config = compose_config("config", None, lengths)
    decoder, mesh = dataclasses.replace(source.network(config.model), dtype="bfloat16"), build((1, 1, 1, 1))
    state, found = abstract_train_state(config.algorithm, decoder, mesh), memory.resident(config, decoder, mesh)
    adapters = 4_399_104 + (897 if critic == "head" else 0)
    norms = 24 * 2 * 896 + 896
    assert found.parameters == 4 * adapters + 2 * 494_032_768 + 2 * norms  # bfloat16, norms as they are
    assert found.optimizer == 8 * adapters + (4 if critic == "none" else 8) and found.reference == 0
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.opt_state)) == 8 * 4_399_104 + 4


def test_frozen_weights_have_half_a_backward_pass():
    """Of 3 tokens in a prompt and 2 x 2 sampled; attention sees 6 pairs, and 2 x 9, and is differentiated whole."""
    config, lengths = small(), ["algorithm.prompt_buckets=[3]", "algorithm.max_new_tokens=2"]
    sizes = ["algorithm.prompts=1", "algorithm.group_size=2"]
    algorithm = compose_config("config", None, [*lengths, *sizes]).algorithm
    layer, head = 32 * (4 + 2 + 2) * 8 + 4 * 8 * 32 + 3 * 32 * 48, 32 * 61
    weights = 2 * (2 * layer * 7 + head * 4)
    seen = 2 * 4 * 4 * 8 * (6 + 2 * 9)
    assert roofline.train_work(config, algorithm).flops == 2 * weights + 3 * seen
    assert roofline.train_work(dataclasses.replace(config, lora=None), algorithm).flops == 3 * (weights + seen)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["model.lora.rank=-1"], ["model.lora.rank=-1", "at least 0"]),
        (["model.lora.alpha=0"], ["model.lora.alpha=0", "above 0"]),
        (["model.lora.rank=4", "model.lora.targets=[]"], ["model.lora.targets=[]", "q, k, v, o, gate, up, down"]),
        (["model.lora.targets=[q,dwon]"], ["'dwon'", "did you mean down"]),
        (["algorithm=ppo", "model.lora.rank=4"], ["algorithm.critic=network", "set algorithm.critic=head"]),
        (["mesh.offload=both", "model.lora.rank=4"], ["mesh.offload=both", "set mesh.offload=optimizer"]),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, words):
    with pytest.raises(ValueError) as error:
        limits.validate(compose_config("config", None, overrides), 1)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.slow
def test_a_critics_head_reads_the_policy_with_its_adapters():
    config = small()
    base, adapters = random_base(config), random_adapters(config)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 61, (2, 8)).astype(np.int32)
    tokens[1, :3] = tokens[0, :3]
    mask = np.arange(8) >= np.full((2, 1), 3)
    head = {"head": {"weight": jnp.asarray(rng.normal(size=32), jnp.float32), "bias": jnp.zeros(1)}}
    scorer = Scorer(config, 1.0, 5, 2)
    thin = jax.jit(lambda base, *rows: scorer.over(base)(*rows))(base, Roles(adapters, head), tokens, mask)
    whole = jax.jit(scorer)(Roles(merge(config, lora.join(config, base, adapters)), head), tokens, mask)
    for a, b in zip(thin, whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert scorer.over(None) is scorer


# ---- a run


@pytest.fixture(scope="module")
def setting(small_run, tmp_path_factory) -> list[str]:
    """Arguments of a run of seconds, graded by a checksum of the reply."""
    folder = tmp_path_factory.mktemp("setting")
    text = (
        "domains:\n"
        "  - {name: copy, train: 'gen:copy,size=7', test: 'gen:copy,split=test,size=5', "
        "GRADER}\n"
        "run: {steps: 4, eval_every: 2, checkpoint_every: 2, keep_last: 9}\n"
        "algorithm: {prompts: 4, group_size: 2, prompt_buckets: [32], max_new_tokens: 4, learning_rate: 0.01}\n"
        "eval: {batch: 8}\n"
        "anchors: {each: 0}\n"
        "rubric: {workers: 1}\n"
    )
    return small_run(folder, text, model=", lora: {rank: 4}")


@pytest.fixture(scope="module")
def saved(setting, tmp_path_factory) -> Path:
    """A run with a checkpoint of adapters that have moved, and not a step taken."""
    folder = tmp_path_factory.mktemp("runs") / "saved"
    config = located(compose_config(setting[3], setting[1], [f"run.dir={folder}", "eval.canary=false"]))
    with session.open_session(config) as opened:
        trainer, state = opened.trainer, opened.state
        assert trainer.reference is trainer.base and opened.evaluator.base is trainer.base  # no second copy
        assert jax.tree.structure(state.train.params) == jax.tree.structure(lora.abstract_params(opened.decoder))
        run_folder.claim(folder, config, opened.data_sha256)
        moved = state._replace(train=state.train._replace(params=random_adapters(opened.decoder, scale=0.3)))
        with Checkpointer(folder / "checkpoints", 1, 0) as checkpoints:
            checkpoints.save(1, moved, None)
    return folder


def test_exports_have_the_logits_of_the_adapters(saved, tmp_path):
    merged, alone = tmp_path / "merged", tmp_path / "adapter"
    assert export.main([str(saved), str(merged)]) == 0
    assert export.main([str(saved), str(alone), "as=adapter"]) == 0
    config = run_folder.load_config(saved, [])
    model, found = map(transformers.AutoModelForCausalLM.from_pretrained, (config.model.path, merged))
    before = torch_logits(model)
    assert change_by_hand(model, alone) == 2 * 7
    expected = torch_logits(model)
    assert np.abs(expected - before).max() > 0.1
    np.testing.assert_allclose(torch_logits(found), expected, atol=1e-4)
    decoder, base = source.load(config.model)
    joined = lora.join(decoder, base, random_adapters(decoder, scale=0.3))
    np.testing.assert_allclose(logits(decoder, joined, TOKENS), expected, atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(merged)("a")
    assert json.loads((alone / lora_folder.CONFIG).read_text())["base_model_name_or_path"] == config.model.path


def test_adapters_name_a_base_that_other_programs_load(tmp_path):
    embedded = transformers.AutoModelForCausalLM.from_pretrained(export.base_of("tiny"))
    assert sum(x.numel() for x in embedded.parameters()) == 1_017_984
    assert export.base_of("org/model") == "org/model" and export.base_of(str(tmp_path)) == str(tmp_path)
    (tmp_path / "model.gguf").touch()
    assert export.base_of(str(tmp_path / "model.gguf")) == str(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="random:qwen2_5_0_5b began from random weights"):
        export.base_of("random:qwen2_5_0_5b")


def test_what_export_cannot_do_is_one_line(saved, tmp_path, capsys):
    with pytest.raises(SystemExit):
        export.main([str(saved), str(tmp_path / "out"), "as=gguf"])
    assert "as=gguf: expected as=merged or as=adapter" in capsys.readouterr().err


@pytest.fixture(scope="module")
def straight(setting, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "straight"
    assert train.main([*setting, f"run.dir={folder}"]) == 0
    return folder


def timeless(folder: Path) -> list[dict]:
    rows = record.read(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


@pytest.mark.slow
def test_a_run_learns_adapters_alone(straight):
    rows = record.read(straight / "metrics.jsonl")
    assert all(row["policy/grad_norm"] > 0 and row["policy/skipped"] == 0 for row in rows[1:])
    assert rows[1]["policy/kl"] == 0 and rows[4]["policy/kl"] > 1e-6  # from what is the base to the bit
    assert rows[0]["canary/kl"] == 0 and rows[4]["canary/kl"] > 0
    assert all(row["rollout/logp_gap"] < 2e-6 for row in rows[1:])  # merged weights sample what the trainer scores
    assert [row["time/compilations"] for row in rows[2:]] == [0] * 3
    with session.open_session(run_folder.load_config(straight, [])) as opened:
        found = run_folder.checkpoints(straight).restore(run_folder.abstract(opened.state))[1]  # no leaf of the base
        base = jax.device_get(opened.trainer.base)
        opened.trainer.step(opened.state)
        for a, b in zip(jax.tree.leaves(opened.trainer.base), jax.tree.leaves(base), strict=True):
            np.testing.assert_array_equal(a, b)  # frozen, and not donated with the state
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found.train.params))  # B began at 0


@pytest.mark.slow
def test_a_resumed_run_is_the_straight_one(setting, straight, tmp_path):
    folder = tmp_path / "run"
    assert train.main([*setting, f"run.dir={folder}", "run.steps=2"]) == 0
    assert resume.main([str(folder), "run.steps=4"]) == 0
    assert timeless(folder) == timeless(straight)


@pytest.mark.slow
def test_a_merged_export_is_graded_as_the_run_is(straight, tmp_path, capsys):
    assert export.main([str(straight), str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    assert evaluate.main([str(straight)]) == 0
    ours, config = capsys.readouterr().out.partition("\n")[2], run_folder.load_config(straight, [])
    own = dataclasses.replace(config.model.lora, rank=0)
    own = dataclasses.replace(config.model, lora=own, path=str(tmp_path / "merged"))
    with session.open_session(dataclasses.replace(config, model=own)) as opened:
        assert results_table(opened.evaluator.run(opened.state.train.params)).strip() == ours.strip()


@pytest.mark.slow
def test_a_mesh_has_one_devices_loss_gradients_and_rollout():
    (report,) = result(child(8, [["compare", "llama", ("fsdp4_tensor2",), 4]]))
    found = report["fsdp4_tensor2"]
    check(found)
    assert found["weights_gathered_in_rollout"] == [] and found["smallest_moment_share"] == 1 / 4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_other_families_and_meshes(family):
    meshes = ("data8", "fsdp4_tensor2", "fsdp2_tensor2_seq2", "data2_fsdp2_tensor2")
    (report,) = result(child(8, [["compare", family, meshes, 4]]))
    for mesh in meshes:
        check(report[mesh])


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["none", "head"])
def test_runs_on_meshes_are_one_devices(critic):
    more = ["model.lora.rank=4", "algorithm.learning_rate=0.002"]
    more += [] if critic == "none" else ["algorithm=ppo", "algorithm.critic=head", "algorithm.minibatches=1"]
    (single,) = result(child(1, [["train", RUNS["single"] + more, True]]))
    waits = [key.replace("offload=both", "offload=optimizer") for key in RUNS["colocated"]]
    colocated, disjoint = result(child(8, [["train", roles + more, True] for roles in (waits, RUNS["disjoint"])]))
    for found, place in ((colocated, "pinned_host"), (disjoint, "device")):
        same(found, single)
        assert found["moments_in"] == [place] and found["compiled_in_third_step"] == 0 and found["moved"] == []
