"""Adapters as a folder of peft's: adapter_config.json and adapter_model.safetensors, under peft's names.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight [rank, in], ...lora_B.weight [out, rank]

`PeftModel.from_pretrained(base, folder)` and inference servers read it; the base's weights are not in it.
"""

import json
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from jax.experimental import multihost_utils

from models.architectures import DecoderConfig
from models.lora import TARGETS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def tensors(config: DecoderConfig, adapters: dict) -> dict[str, np.ndarray]:
    """Name -> float32 matrix, all layers' of all targets."""
    found, rank = {}, config.lora.rank
    for factor, stacked in adapters["layers"].items():
        name, kind = factor.rsplit("_", 1)
        for layer, x in enumerate(_fetch(stacked)):
            matrix = x.reshape(-1, rank) if kind == "a" else x.reshape(rank, -1)  # [in, rank] or [rank, out]
            path = f"base_model.model.model.layers.{layer}.{TARGETS[name].module}.lora_{kind.upper()}.weight"
            found[path] = np.ascontiguousarray(matrix.T)
    return found


def save(config: DecoderConfig, adapters: dict, folder: str | Path, base: str) -> None:
    """Writes both files. `base`: of the model, for whoever loads the adapter. All processes call; the first writes."""
    found = tensors(config, adapters)
    if jax.process_index():
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": [TARGETS[name].module.split(".")[1] for name in TARGETS if name in config.lora.targets],
    }
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    safetensors.numpy.save_file(found, folder / WEIGHTS, metadata={"format": "pt"})


def _fetch(x: jax.Array) -> np.ndarray:
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))
