"""Folders against transformers: its torch models' logits, in both directions, and everything that can be wrong.

torch is imported in the tests alone: loading, training and saving do without it.
"""

import functools
import json
import re
import shutil
import subprocess
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers

from models import hf, hf_table, policy
from models.architectures import from_hf

TOKENS = np.random.default_rng(0).integers(0, 67, (2, 24))
SIZES = dict(
    vocab_size=67,
    hidden_size=48,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
# Original lengths below the 24 tokens of a row: the scaling variants then change every row.
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=8.0)
CASES = {
    "llama-tied": ("LlamaConfig", dict(tie_word_embeddings=True)),
    "llama3-rope": ("LlamaConfig", dict(rope_parameters=LLAMA3 | {"original_max_position_embeddings": 16})),
    "llama-yarn": ("LlamaConfig", dict(rope_parameters=YARN | {"original_max_position_embeddings": 16})),
    "qwen2": ("Qwen2Config", dict(tie_word_embeddings=True)),
    "qwen2-window": ("Qwen2Config", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": ("Qwen3Config", dict(head_dim=16)),
    "gemma3": (
        "Gemma3TextConfig",
        dict(head_dim=16, sliding_window=5, sliding_window_pattern=3, query_pre_attn_scalar=12, rope_scaling=None),
    ),
    "gemma3-softcap-linear": (
        "Gemma3TextConfig",
        dict(
            head_dim=16,
            sliding_window=7,
            sliding_window_pattern=2,
            final_logit_softcapping=2.0,
            tie_word_embeddings=False,
            rope_parameters={
                "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                "sliding_attention": dict(rope_type="default", rope_theta=1e4),
            },
        ),
    ),
}


def torch_model(case):
    """Random torch model in float32, every norm and bias of it too."""
    import torch

    name, options = CASES[case]
    hf_config = getattr(transformers, name)(**SIZES | dict(pad_token_id=None, eos_token_id=None) | options)
    hf_config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0 if weight.ndim > 1 else 0.5, 0.15)
    return model


def torch_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def reload_in_torch(folder):
    import torch

    options = dict(dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def assert_trees_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_with_transformers_in_both_directions(case, tmp_path):
    model = torch_model(case)
    model.save_pretrained(tmp_path / "theirs")
    expected = torch_logits(model)
    config, params = hf.load(tmp_path / "theirs", jnp.float32)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, policy.abstract_params(config))
    found = jax.jit(policy.logits, static_argnums=0)(config, params, TOKENS)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=1e-4)

    hf.save(config, params, tmp_path / "ours")
    np.testing.assert_array_equal(torch_logits(reload_in_torch(tmp_path / "ours")), expected)
    theirs, ours = (safetensors.numpy.load_file(tmp_path / x / "model.safetensors") for x in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() and all(np.array_equal(theirs[name], ours[name]) for name in theirs)


@functools.cache
def random_model(case):
    """Ours, without torch."""
    name, options = CASES[case]
    config = from_hf(getattr(transformers, name)(**SIZES | options))
    leaves, tree = jax.tree.flatten(policy.abstract_params(config))
    rng = np.random.default_rng(0)
    return config, tree.unflatten([jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


@pytest.mark.parametrize("case", ["qwen2", "gemma3-softcap-linear"])
def test_files_above_the_limit_are_split_and_read_back(case, tmp_path):
    config, params = random_model(case)
    hf.save(config, params, tmp_path, shard_bytes=50_000)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 3 and not (tmp_path / "model.safetensors").exists()
    biggest = max(np.prod(tensor.shape) for tensor in hf_table.tensors(config)) * 4
    assert all(file.stat().st_size < max(50_000, biggest) + 5_000 for file in files)  # 5 kB of headers
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    loaded_config, loaded = hf.load(tmp_path, jnp.float32)
    assert loaded_config == config
    assert_trees_equal(loaded, params)
    reload_in_torch(tmp_path)
    hf.save(config, params, tmp_path)  # one file replaces the many
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]


def test_bfloat16_is_stored_computed_and_written(tmp_path):
    config, params = random_model("qwen3")
    hf.save(config, params, tmp_path, dtype=jnp.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    loaded_config, loaded = hf.load(str(tmp_path))
    assert loaded_config.dtype == "bfloat16"
    assert_trees_equal(loaded, rounded)
    _, wide = hf.load(tmp_path, jnp.float32)
    assert_trees_equal(wide, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded))
    with pytest.raises(ValueError, match="dtype float16 is not supported"):
        hf.load(tmp_path, jnp.float16)


def test_tied_head_and_inverse_frequencies_of_older_files_are_ignored(tmp_path):
    config, params = random_model("llama-tied")
    hf.save(config, params, tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    assert_trees_equal(hf.load(tmp_path, jnp.float32)[1], params)


def test_assemble_takes_any_source_of_tensors(tmp_path):
    config, params = random_model("gemma3")
    hf.save(config, params, tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert_trees_equal(hf.assemble(config, tensors.__getitem__, jnp.float32), params)


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_tensors(folder, edit):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    edit(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


NORM = "model.layers.1.input_layernorm.weight"
DAMAGE = {
    "config.json does not exist: give a Hugging Face model folder": lambda d: (d / "config.json").unlink(),
    "config.json: not JSON": lambda d: (d / "config.json").write_text("{"),
    "model_type 'mistral' is not supported: use one of llama, qwen2, qwen3, gemma3_text": lambda d: edit_config(
        d, model_type="mistral"
    ),
    "config.json: rope_type 'longrope' is not supported": lambda d: edit_config(
        d, rope_parameters=dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[1.0] * 4)
    ),
    "config.json: Validation error for field 'hidden_size'": lambda d: edit_config(d, hidden_size="wide"),
    "holds neither model.safetensors nor model.safetensors.index.json": lambda d: (d / "model.safetensors").unlink(),
    "model.safetensors: not a safetensors file": lambda d: truncate(d / "model.safetensors"),
    f"model.safetensors: tensor {NORM} has shape (47,), but config.json makes it (48,)": lambda d: edit_tensors(
        d, lambda tensors: tensors.update({NORM: np.ones(47, np.float32)})
    ),
    f"tensor {NORM} is missing: copy or save the whole model again": lambda d: edit_tensors(
        d, lambda tensors: tensors.pop(NORM)
    ),
    "tensor lm_head.weight is missing": lambda d: edit_config(d, tie_word_embeddings=False),
    "tensor vision.weight has no place in a llama decoder (1 such tensors)": lambda d: edit_tensors(
        d, lambda tensors: tensors.update({"vision.weight": np.ones(3, np.float32)})
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_named_in_one_line(message, tmp_path):
    hf.save(*random_model("llama-tied"), tmp_path)
    DAMAGE[message](tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)) as error:
        hf.load(tmp_path, jnp.float32)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_missing_shard_is_named(tmp_path):
    hf.save(*random_model("llama-tied"), tmp_path, shard_bytes=50_000)
    file = sorted(tmp_path.glob("model-*"))[1]
    shutil.move(file, tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"{file.name} does not exist, but model.safetensors.index.json places"):
        hf.load(tmp_path)


def test_unreachable_hub_model_is_named(monkeypatch):
    def offline(hub_id, **_):
        raise huggingface_hub.errors.LocalEntryNotFoundError("Cannot reach the hub.\nMore about it.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="'org/name' is neither a folder nor a hub model in reach") as error:
        hf.load("org/name")
    assert "\n" not in str(error.value)


MESH_SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from models import hf
from sharding.mesh import build

folder, out = sys.argv[1:]
mesh = build((2, 2, 1, 2))
_, whole = hf.load(folder, jnp.float32)
config, params = hf.load(folder, jnp.float32, mesh=mesh)
jax.tree.map(np.testing.assert_array_equal, params, whole)
layers = params["layers"]
assert layers["qkv"].sharding.spec == P(None, ("fsdp",), ("tensor",)), layers["qkv"].sharding
assert layers["qkv_bias"].sharding.spec == P(None, ("tensor",))
assert layers["gate_up"].sharding.spec == P(None, ("fsdp",), None, ("tensor",))
assert layers["down"].sharding.spec == P(None, ("tensor",), ("fsdp",))
assert params["embed"].sharding.spec == P(None, ("fsdp",))  # 67 rows: tensor=2 does not divide them
assert layers["qkv"].addressable_shards[0].data.shape == (3, 24, 1, 5, 8)
hf.save(config, params, out)
"""


def test_loads_straight_onto_a_mesh_and_saves_from_it(tmp_path):
    """In a process of its own, since the number of CPU devices is fixed when jax starts."""
    hf.save(*random_model("qwen2"), tmp_path / "in", shard_bytes=50_000)
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": ".", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", MESH_SCRIPT, tmp_path / "in", tmp_path / "out"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_trees_equal(hf.load(tmp_path / "out", jnp.float32)[1], random_model("qwen2")[1])
