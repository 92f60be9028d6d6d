"""Networks stated by their shape alone, models/shapes/<name>.json: Hugging Face configs of public models.

shape:qwen2_5_1_5b     no weights: what `python -m infinite_jax.plan` compiles for, and nothing can train
random:qwen2_5_1_5b    the same network from random weights, to measure speed and memory; with the byte tokenizer of
                       the embedded model, whose ids every vocabulary holds
"""

import json
from pathlib import Path

import jax
import transformers
from jax.sharding import Mesh

from models import policy
from models.architectures import DecoderConfig, from_hf
from sharding.rules import tree_shardings

FOLDER = Path(__file__).parent / "shapes"
SHAPE, RANDOM = "shape:", "random:"
SEED = 0  # of random weights: every process, and a resumed run, begins with the same


def is_shape(path: str) -> bool:
    return path.startswith((SHAPE, RANDOM))


def names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def read(path: str) -> DecoderConfig:
    """The network that shape:NAME or random:NAME states. Raises ValueError, one line, where there is no such name."""
    name = path.partition(":")[2]
    if name not in names():
        raise ValueError(f"model.path={path}: there is no shape {name!r}; known: {', '.join(names())}")
    fields = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return from_hf(transformers.AutoConfig.for_model(fields.pop("model_type"), **fields))


def load(path: str, dtype, *, mesh: Mesh | None = None) -> tuple[DecoderConfig, dict]:
    """Network and random parameters in `dtype`, born on their shardings. Raises ValueError for shape:NAME."""
    config, name = read(path), path.partition(":")[2]
    if path.startswith(SHAPE):
        raise ValueError(
            f"model.path={path}: a shape has no weights: set model.path to a folder or hub id of that model, or to "
            f"{RANDOM}{name} to begin from random ones"
        )

    def init() -> dict:
        return jax.tree.map(lambda x: x.astype(dtype), policy.init(config, jax.random.key(SEED)))

    shardings = tree_shardings(mesh, policy.logical_axes(config), policy.abstract_params(config)) if mesh else None
    return config, jax.jit(init, out_shardings=shardings)()
