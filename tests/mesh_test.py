"""The GRPO step and the rollout on meshes of eight fake CPU devices give one device's numbers.

pytest runs on one device, so the meshes live in a child process (this file run as a script).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
MESHES = {"data8": (8, 1, 1, 1), "fsdp8": (1, 8, 1, 1), "fsdp4_tensor2": (1, 4, 2, 1)}
ROLLOUT = ((1, 1, 1, 1), MESHES["fsdp4_tensor2"])
STEP = (MESHES["fsdp4_tensor2"],)


def relative(a, b) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def measure() -> dict[str, dict[str, float]]:
    """Per mesh, the largest difference from one device: relative for loss and gradients, absolute for the rollout."""
    import dataclasses
    import functools

    import jax
    from transformers import LlamaConfig

    from configs.cli import compose_config
    from infinite_jax import grpo
    from infinite_jax.rollout import Sampling, generate
    from infinite_jax.score import Scorer, completion_logp
    from infinite_jax.trainer import _train_step, initial_train_state, place
    from infinite_jax.types import Batch
    from models import policy
    from models.architectures import from_hf
    from sharding.mesh import MeshConfig, make_mesh
    from sharding.rules import tree_shardings

    shape = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    decoder = from_hf(shape)
    initial = jax.device_get(policy.init(decoder, jax.random.key(0)))
    config = dataclasses.replace(
        compose_config("config", None, []).algorithm, kl_type="loss", kl_estimator="k3_is", kl_coef=0.1
    )
    rng = np.random.default_rng(0)
    rows, group, width, length = 16, config.group_size, 5, 12  # prompts of 3 and of 5 tokens
    start = np.repeat([3, 5], group)
    slot = np.arange(length) - start[:, None]
    mask = (slot >= 0) & (slot < length - width) & ((slot == 0) | (rng.random((rows, length)) < 0.8))
    tokens = rng.integers(0, 64, (rows, length)).astype(np.int32)
    tokens = np.where(slot < 0, tokens[np.repeat([0, group], group)], tokens)
    normal = lambda: rng.normal(size=(rows, length)).astype(np.float32) * 0.3  # noqa: E731
    old = normal() - 4
    batch = Batch(
        tokens, mask, old, old + 0.1 * normal(), old + normal(),
        normal() * 3, rng.random(rows).astype(np.float32), np.ones(rows, np.float32),
    )  # fmt: skip
    sampling = Sampling(1.0, 0, 1.0, 5, 2, (1,), 0)
    prompt_PT, length_P = rng.integers(2, 64, (8, 6)).astype(np.int32), np.array([6, 5, 4, 3, 6, 2, 1, 6], np.int32)

    def logp_fn(params, tokens_BT, mask_BT):
        return completion_logp(decoder, params, tokens_BT, mask_BT, 1.0, length - width, group)

    def results(sizes, devices):
        mesh = make_mesh(MeshConfig(*sizes), devices)
        shardings = tree_shardings(mesh, policy.logical_axes(decoder), initial)
        with jax.set_mesh(mesh):
            params = jax.device_put(initial, shardings)
            placed = jax.tree.map(lambda x: place(mesh, x), batch)
            loss, _, grads = jax.jit(functools.partial(grpo.loss_and_grad, config, logp_fn))(params, placed)
            made = None
            if sizes in ROLLOUT:
                placed = place(mesh, prompt_PT), place(mesh, length_P)
                made = generate(decoder, sampling, params, *placed, jax.random.key(0))
            state = initial_train_state(config, decoder, params, mesh)
            moments = jax.tree.leaves(state.opt_state)
            split = min(x.addressable_shards[0].data.size / x.size for x in moments if x.ndim > 1)
            moved = []
            if sizes in STEP:
                before = jax.tree.map(lambda x: x.sharding, state)
                scorer = Scorer(decoder, 1.0, length - width, group)
                state, _ = _train_step(config, scorer, state, jax.tree.map(lambda x: place(mesh, x), batch))
                after = jax.tree.map(lambda x: x.sharding, state)
                pairs = zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True)
                moved = [f"{jax.tree_util.keystr(path)}: {a} -> {b}" for (path, a), b in pairs if a != b]
        return jax.device_get((loss, grads, made)), split, moved

    (loss, grads, made), *_ = results((1, 1, 1, 1), jax.devices()[:1])
    report = {}
    for name, sizes in MESHES.items():
        (loss_m, grads_m, made_m), split, moved = results(sizes, jax.devices())
        report[name] = {
            "loss": abs(float(loss_m - loss)) / abs(float(loss)),
            "grad": max(relative(a, b) for a, b in zip(jax.tree.leaves(grads_m), jax.tree.leaves(grads))),
            "smallest_moment_share": split,
            "moved": moved,
        }
        if made_m is not None:
            report[name]["tokens_differ"] = int((made_m.tokens_BT != made.tokens_BT).sum())
            report[name]["rollout_logp"] = float(np.abs(made_m.logp_BT - made.logp_BT).max())
    assert abs(float(loss)) > 1e-3
    return report


@pytest.fixture(scope="module")
def report() -> dict:
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    ran = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", MESHES)
def test_loss_and_gradients_are_one_devices(report, mesh):
    found = report[mesh]
    assert found["loss"] < 1e-5 and found["grad"] < 1e-5, found


def test_the_rollout_is_one_devices(report):
    found = report["fsdp4_tensor2"]
    assert found["tokens_differ"] == 0 and found["rollout_logp"] < 1e-5, found


@pytest.mark.parametrize("mesh", ["fsdp8", "fsdp4_tensor2"])
def test_optimizer_moments_are_split_like_the_parameters(report, mesh):
    assert report[mesh]["smallest_moment_share"] == 1 / 8


def test_an_update_leaves_every_split_as_it_was(report):
    """Another one, or the same in other words, would have every program of the next step compiled again."""
    assert report["fsdp4_tensor2"]["moved"] == []


if __name__ == "__main__":
    print(json.dumps(measure()))
