"""Tests run on the CPU, whatever the machine has, and compile each program once a session."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

_cache = tempfile.TemporaryDirectory(prefix="infinite_jax_compiled_")
jax.config.update("jax_compilation_cache_dir", _cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(scope="session")
def save_small_model() -> Callable[..., None]:
    """save(folder, **changes of its LlamaConfig): a policy of 17,000 parameters on bytes, as FOLDER/model, and a grader
    whose grades look random but are not, as FOLDER/checksum.py."""
    from transformers import LlamaConfig

    from models import hf, policy, source, tokenizer
    from models.architectures import from_hf

    shape = dict(vocab_size=262, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    shape |= dict(num_key_value_heads=1, head_dim=16, tie_word_embeddings=True, eos_token_id=261)

    def save(folder: Path, **changes) -> None:
        config = from_hf(LlamaConfig(**shape | changes))
        hf.save(config, policy.init(config, jax.random.key(0)), folder / "model")
        tokenizer.load(str(source.TINY)).save_pretrained(folder / "model")
        (folder / "checksum.py").write_text(
            "import zlib\n\n\ndef grade(reply, answer, meta):\n    return 1 + zlib.crc32(reply.encode()) % 4\n"
        )

    return save
