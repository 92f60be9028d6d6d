"""Hyper-parameters against published config.json files and against transformers' own rotary frequencies."""

import json
import math
import re

import numpy as np
import pytest
import transformers

from models import architectures
from models.architectures import Rope, from_hf, rope_frequencies, to_hf

SMOLLM2 = dict(
    model_type="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=100000,
    rope_scaling=None,
    tie_word_embeddings=True,
    torch_dtype="bfloat16",
)
LLAMA32 = dict(
    model_type="llama",
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=dict(
        factor=32.0,
        high_freq_factor=4.0,
        low_freq_factor=1.0,
        original_max_position_embeddings=8192,
        rope_type="llama3",
    ),
    tie_word_embeddings=True,
)
QWEN25 = dict(
    model_type="qwen2",
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    max_position_embeddings=32768,
    max_window_layers=21,
    sliding_window=32768,
    use_sliding_window=False,
    rope_theta=1000000.0,
    tie_word_embeddings=True,
)
QWEN3 = dict(
    model_type="qwen3",
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40960,
    rope_theta=1000000,
    tie_word_embeddings=True,
)
GEMMA3 = dict(
    model_type="gemma3_text",
    vocab_size=262144,
    hidden_size=640,
    intermediate_size=2048,
    num_hidden_layers=18,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    max_position_embeddings=32768,
    query_pre_attn_scalar=256,
    sliding_window=512,
    _sliding_window_pattern=6,
    rope_theta=1000000.0,
    rope_local_base_freq=10000.0,
    rope_scaling=None,
)


def read(fields: dict, folder):
    (folder / "config.json").write_text(json.dumps(fields))
    return from_hf(transformers.AutoConfig.from_pretrained(folder))


def test_older_fields_of_hub_files_are_read(tmp_path):
    config = read(SMOLLM2, tmp_path)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.num_layers) == (9, 3, 64, 30)
    assert config.rope == Rope("default", 100000.0, ()) == config.rope_local
    assert config.windows == (0,) * 30 and config.tied_embeddings and config.query_scale == 0.125
    llama = read(LLAMA32, tmp_path)
    assert llama.rope.kind == "llama3" and llama.rope.theta == 500000.0
    assert dict(llama.rope.scaling)["factor"] == 32.0 and dict(llama.rope.scaling)["low_freq_factor"] == 1.0
    qwen2, qwen3 = read(QWEN25, tmp_path), read(QWEN3, tmp_path)
    assert qwen2.qkv_bias and not qwen2.qk_norm and qwen2.windows == (0,) * 24  # windows written down but switched off
    assert qwen3.qk_norm and not qwen3.qkv_bias and qwen3.head_dim == 128 != 1024 // 16


def test_gemma3_alternates_five_local_layers_and_a_global_one(tmp_path):
    config = read(GEMMA3, tmp_path)
    assert config.windows == (512, 512, 512, 512, 512, 0) * 3
    assert (config.rope.theta, config.rope_local.theta) == (1e6, 1e4)
    assert config.embed_scale == math.sqrt(640) and config.query_scale == 1 / 16
    assert config.norm_offset == 1.0 and config.post_norms and config.qk_norm and config.tied_embeddings


@pytest.mark.parametrize("fields", [SMOLLM2, LLAMA32, QWEN25, QWEN3, GEMMA3], ids=lambda fields: fields["model_type"])
def test_to_hf_is_the_inverse(fields, tmp_path):
    config = read(fields, tmp_path)
    assert isinstance(hash(config), int)
    assert from_hf(to_hf(config)) == config
    to_hf(config).save_pretrained(tmp_path)  # and what transformers writes is read again
    assert from_hf(transformers.AutoConfig.from_pretrained(tmp_path)) == config


def test_default_frequencies_by_hand():
    frequencies, factor = rope_frequencies(Rope("default", 10000.0, ()), 4)
    np.testing.assert_allclose(frequencies, [1.0, 0.01], rtol=1e-6)  # 10000^0, 10000^(-2/4)
    assert frequencies.dtype == np.float32 and factor == 1.0
    halved, _ = rope_frequencies(Rope("linear", 10000.0, (("factor", 2.0),)), 4)
    np.testing.assert_allclose(halved, [0.5, 0.005], rtol=1e-6)


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_type="linear", factor=4.0),
        dict(rope_type="dynamic", factor=4.0),
        dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
        dict(rope_type="llama3", factor=32.0, low_freq_factor=1.5, high_freq_factor=6.0),
        dict(rope_type="yarn", factor=4.0),
        dict(rope_type="yarn", factor=4.0, beta_fast=16.0, beta_slow=2.0, attention_factor=1.2),
        dict(rope_type="yarn", factor=4.0, truncate=False, mscale=1.0, mscale_all_dim=0.7),
    ],
    ids=lambda rope: "-".join(map(str, rope.values())),
)
def test_frequencies_agree_with_transformers(rope):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    original = {} if rope["rope_type"] in ("linear", "dynamic") else {"original_max_position_embeddings": 1024}
    hf_config = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=4096,
        rope_parameters=rope | original | {"rope_theta": 50000.0},
    )
    theirs, attention = ROPE_INIT_FUNCTIONS[rope["rope_type"]](hf_config)
    ours, factor = rope_frequencies(from_hf(hf_config).rope, 64)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
    assert factor == pytest.approx(attention, rel=1e-6)


PROPORTIONAL = dict(rope_type="proportional", rope_theta=1e4)
PARTIAL = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("MistralConfig", {}, "model_type 'mistral' is not supported: use one of llama, qwen2"),
        ("LlamaConfig", dict(hidden_act="relu"), "activation 'relu'"),
        ("LlamaConfig", dict(attention_bias=True), "attention_bias=True"),
        ("LlamaConfig", dict(mlp_bias=True), "mlp_bias=True"),
        ("LlamaConfig", dict(num_attention_heads=32, num_key_value_heads=5), "multiple of num_key_value_heads=5"),
        (
            "LlamaConfig",
            dict(rope_parameters=dict(rope_type="proportional", rope_theta=1e4)),
            "rope_type 'proportional'",
        ),
        ("LlamaConfig", dict(rope_parameters=PARTIAL), "partial_rotary_factor=0.5"),
        ("Qwen3Config", dict(num_hidden_layers=1, layer_types=["chunked_attention"]), "chunked_attention"),
        ("Gemma3TextConfig", dict(use_bidirectional_attention=True), "use_bidirectional_attention=True"),
        ("Gemma3TextConfig", dict(attn_logit_softcapping=50.0), "attn_logit_softcapping=50.0"),
    ],
)
def test_what_the_decoder_lacks_is_refused(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        from_hf(getattr(transformers, name)(**options))
    assert "\n" not in str(refusal.value) and "config.json" in str(refusal.value)


def test_every_family_is_written():
    assert set(architectures.FAMILIES) == {f["model_type"] for f in (SMOLLM2, QWEN25, QWEN3, GEMMA3)}
