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


@pytest.fixture(scope="session")
def small_run(save_small_model) -> Callable[..., list[str]]:
    """write(folder, text): arguments of a run of the small model whose other settings are the YAML `text`, in which
    GRADER stands for the domain's key and value of the grader beside the model. Further arguments: the defaults, the
    model's own settings, changes of its LlamaConfig."""

    def write(folder: Path, text: str, defaults: str = "[config, _self_]", model: str = "", **changes) -> list[str]:
        save_small_model(folder, **changes)
        text = text.replace("GRADER", f"environment: {folder / 'checksum.py'}")
        head = f"defaults: {defaults}\nmodel: {{path: {folder / 'model'}{model}}}\n"
        (folder / "small.yaml").write_text(head + text)
        return ["--config-dir", str(folder), "--config-name", "small"]

    return write
