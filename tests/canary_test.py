"""The canary against transformers' torch model in float64, and on a mesh of fake devices."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer, LlamaConfig

from infinite_jax import canary
from infinite_jax.canary import Canary, divergence
from models import hf, policy, source, tokenizer
from models.architectures import from_hf
from sharding.mesh import build
from sharding.rules import tree_shardings

ROOT = Path(__file__).resolve().parent.parent
MESHES = ((1, 4, 1, 2), (1, 2, 4, 1))  # data, fsdp, seq, tensor
TEXT, PROMPTS = (block.splitlines() for block in (ROOT / "infinite_jax/canary.txt").read_text().strip().split("\n\n"))
TINY = source.ModelConfig("tiny", "float32", "none", True, "auto", source.LoraConfig(0, 1.0, ()))


def moved(params, scale: float, seed: int = 0):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


@pytest.fixture(scope="module")
def tiny():
    """(decoder, start, parameters after some training, tokenizer, the canary of the start)."""
    mesh, text = build((1, 1, 1, 1)), source.load_tokenizer(TINY)
    decoder, start = source.load(TINY, mesh)
    return decoder, start, moved(start, 0.02), text, Canary(decoder, mesh, text, tokenizer.pad_id(text), True, start)


def torch_log_probs(decoder, params, folder, rows) -> list[np.ndarray]:
    """f64 [tokens, V] for each row; padding behind a row does not reach it, attention is causal."""
    import torch
    from transformers import AutoModelForCausalLM

    hf.save(decoder, params, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    padded = torch.tensor([[*ids, *[0] * (max(map(len, rows)) - len(ids))] for ids in rows])
    with torch.no_grad():
        log_probs = torch.log_softmax(model(padded).logits, -1).numpy()
    return [line[: len(ids)] for line, ids in zip(log_probs, rows)]


def test_equals_the_torch_model_in_float64(tiny, tmp_path):
    decoder, start, now, _, bird = tiny
    reader = AutoTokenizer.from_pretrained(source.resolve("tiny"))
    text = [reader(line).input_ids[:64] for line in TEXT]
    prompts = [
        reader.apply_chat_template([{"role": "user", "content": line}], add_generation_prompt=True, return_dict=False)
        for line in PROMPTS
    ]
    log_p0 = np.stack([x[-16:] for x in torch_log_probs(decoder, start, tmp_path / "start", prompts)])
    found = torch_log_probs(decoder, now, tmp_path / "now", text + prompts)
    log_p = np.stack([x[-16:] for x in found[len(text) :]])
    token_nll = np.concatenate([-x[np.arange(len(ids) - 1), ids[1:]] for x, ids in zip(found, text)])
    expected = {
        "canary/nll": token_nll.mean(),
        "canary/kl": (np.exp(log_p0) * (log_p0 - log_p)).sum(-1).mean(),
        "canary/kl_reverse": (np.exp(log_p) * (log_p - log_p0)).sum(-1).mean(),
    }
    assert len(token_nll) == 16 * 63 and expected["canary/kl"] > 0.05
    got = bird.run(now)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-5), name


def test_the_start_is_at_no_distance_and_small_steps_at_small_ones(tiny):
    """KL is quadratic in a small step: a hundredth of the step, a ten-thousandth of the KL, down to 1e-7 in float32."""
    _, start, _, _, bird = tiny
    at_start = bird.run(start)
    assert at_start["canary/kl"] == 0 and at_start["canary/kl_reverse"] == 0
    large, small = bird.run(moved(start, 1e-3)), bird.run(moved(start, 1e-5))
    assert small["canary/kl"] == pytest.approx(1e-4 * large["canary/kl"], rel=0.1)
    assert small["canary/kl"] < 1e-6


def test_a_canary_made_again_from_the_start_gives_the_same_numbers(tiny):
    """What a resumed run does; also when the run computes in bfloat16."""
    decoder, start, now, text, bird = tiny
    for dtype in ("float32", "bfloat16"):
        again = Canary(dataclasses.replace(decoder, dtype=dtype), bird.mesh, text, tokenizer.pad_id(text), True, start)
        assert again.run(now) == bird.run(now)


def test_divergence_by_hand():
    """(1/2, 1/2, 0+) and (3/4, 1/4, 0+): KL ln(4/3)/2 = .143841; reverse 3/4 ln(3/2) + 1/4 ln(1/2) = .130812."""
    start, now = jnp.log(jnp.array([[0.5, 0.5, 1e-30]])), jnp.log(jnp.array([[0.75, 0.25, 1e-20]]))
    np.testing.assert_allclose(divergence(start, now), [[0.143841, 0.130812]], atol=1e-6)
    never = divergence(jnp.array([0.0, -200.0]), jnp.array([-200.0, 0.0]))  # exp(200) does not fit in float32
    np.testing.assert_allclose(never, [200.0, 200.0], rtol=1e-6)
    assert float(divergence(start, start + 1e-6)[0, 0]) < 1e-9  # a normaliser off by 1e-6 is no divergence


def test_prompts_shorter_than_the_positions_count_what_they_have(tiny, tmp_path, monkeypatch):
    decoder, start, now, text, bird = tiny
    (tmp_path / "short.txt").write_text("A line of text.\nAnother.\n\nabcd\nefghijklmnopqrstuvwxyz\n")
    monkeypatch.setattr(canary, "FILE", tmp_path / "short.txt")
    got = Canary(decoder, bird.mesh, text, tokenizer.pad_id(text), False, start).run(now)
    rows = np.zeros((2, 32), np.int32)  # causal: what stands behind a row does not reach it
    rows[0, :4], rows[1, :22] = text("abcd").input_ids, text("efghijklmnopqrstuvwxyz").input_ids
    log_probs = jax.jit(lambda params: jax.nn.log_softmax(policy.logits(decoder, params, rows)))
    before, after = (
        np.concatenate([x[0, :4], x[1, 6:22]]) for x in (np.asarray(log_probs(params)) for params in (start, now))
    )
    assert got["canary/kl"] == pytest.approx((np.exp(before) * (before - after)).sum(-1).mean(), rel=1e-4)


def test_a_tokenizer_of_another_model_is_refused(tiny):
    decoder, start, _, text, bird = tiny
    with pytest.raises(ValueError, match="use the tokenizer that the model was trained with"):
        Canary(dataclasses.replace(decoder, vocab_size=90), bird.mesh, text, 0, True, start)


def small(shape: tuple[int, ...]) -> dict[str, float]:
    """A random model of 17,000 parameters on a mesh."""
    layout = LlamaConfig(
        vocab_size=262, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    decoder, text = from_hf(layout), source.load_tokenizer(TINY)
    start = policy.init(decoder, jax.random.key(0))
    mesh = build(shape)
    place = tree_shardings(mesh, policy.logical_axes(decoder), start)
    start, now = (jax.device_put(params, place) for params in (start, moved(start, 0.1)))
    return Canary(decoder, mesh, text, tokenizer.pad_id(text), True, start).run(now)


@pytest.mark.slow
def test_meshes_give_one_devices_numbers():
    """A child process with eight fake CPU devices, this file run as a script."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, __file__], env=os.environ | flags, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    expected = small((1, 1, 1, 1))
    assert expected["canary/kl"] > 0.01
    for found in json.loads(ran.stdout.splitlines()[-1]):
        assert found == pytest.approx(expected, rel=1e-5)


if __name__ == "__main__":
    print(json.dumps([small(shape) for shape in MESHES]))
