"""Which kernel computes attention: by the machine, the model and the rows, or the one that is named.

`auto` takes the first of tpu, cudnn, mgpu and xla that can. docs/kernels.md repeats SUPPORT, a column a device.
"""

import importlib
import re

import jax.numpy as jnp

from kernels.block import Block

KERNELS = ("xla", "tpu", "cudnn", "mgpu")
AUTO = ("tpu", "cudnn", "mgpu", "xla")  # in this order

# NVIDIA's architectures by the names that jax's device_kind has for their cards
CARDS = {
    "Blackwell": r"G?B[123]00|RTX 50[5-9]0|RTX PRO \d000",
    "Hopper": r"G?H[128]00|H20",
    "Ada": r"L4|L20|L40S?|RTX 40[5-9]0|RTX \d000 Ada",
    "Ampere": r"A100|A800|A2|A10G?|A16|A30|A40|RTX 30[5-9]0|RTX A\d000",
}

ROWS = ("whole rows", "packed rows", "sliding windows")  # whole, or padded on the right; of segments; by positions
WHOLE = ROWS[:1]  # cuDNN's own packed layout and window are no part of kernels/block_cudnn.py, which says why
SUPPORT = {
    "xla": {device: ROWS for device in ("CPU", "TPU", *CARDS, "other GPU")},
    "tpu": {"TPU": ROWS},
    "cudnn": {"Ampere": WHOLE, "Ada": WHOLE, "Hopper": WHOLE, "Blackwell": WHOLE},
    "mgpu": {"Hopper": ROWS},
}
DTYPES = {"tpu": ("bfloat16", "float32"), "cudnn": ("bfloat16", "float16"), "mgpu": ("bfloat16", "float16")}
HEAD_DIMS = {"mgpu": (64, 128)}  # a tile of queries, two of keys and of values fit the shared memory
CUDNN_HEAD_DIM = {"Ampere": 128, "Ada": 128, "Hopper": 256, "Blackwell": 256}  # at most, and a multiple of 8


def choose(name: str, platform: str, device_kind: str, *, head_dim: int, dtype, windows: bool, packed: bool) -> str:
    """One of KERNELS.

    Args:
      name: auto or one of KERNELS, as in the config key model.attention.
      platform, device_kind: jax.Device's. An unknown GPU gets xla.
      dtype: of queries, keys and values.
      windows: some layer sees a sliding window only.
      packed: rows hold several segments.

    Raises ValueError for a name that is not one of these, or whose kernel cannot do this here.
    """
    if name not in ("auto", *KERNELS):
        raise ValueError(f"model.attention={name}: it is auto, {', '.join(KERNELS[:-1])} or {KERNELS[-1]}")
    device = architecture(platform, device_kind)
    needs = [rows for rows, needed in zip(ROWS, (True, packed, windows)) if needed]
    obstacles = {kernel: _obstacle(kernel, device, head_dim, jnp.dtype(dtype).name, needs) for kernel in KERNELS}
    picked = next(kernel for kernel in AUTO if obstacles[kernel] is None)
    if name == "auto":
        return picked
    if obstacles[name] is not None:
        remedy = f"set model.attention=auto, which takes {picked}"
        raise ValueError(f"model.attention={name} on {device_kind}: {obstacles[name]}: {remedy}")
    return name


def architecture(platform: str, device_kind: str) -> str:
    """CPU, TPU, a key of CARDS or "other GPU"."""
    if platform in ("cpu", "tpu"):
        return platform.upper()
    for name, cards in CARDS.items():
        if re.search(rf"\b({cards})\b", device_kind):
            return name
    return "other GPU"


def block(name: str) -> Block:
    """The kernel of one of KERNELS. Its module is imported here: each needs its own part of jax."""
    return importlib.import_module(f"kernels.block_{name}").BLOCK


def _obstacle(kernel: str, device: str, head_dim: int, dtype: str, needs: list[str]) -> str | None:
    """Why a kernel cannot compute this, or None."""
    if device not in SUPPORT[kernel]:
        return f"it runs on {', '.join(SUPPORT[kernel])} only"
    if missing := [rows for rows in needs if rows not in SUPPORT[kernel][device]]:
        return f"it has no {' and no '.join(missing)}"
    if dtype not in DTYPES.get(kernel, (dtype,)):
        return f"it computes in {' or '.join(DTYPES[kernel])}, not in {dtype}"
    if head_dim not in HEAD_DIMS.get(kernel, (head_dim,)):
        return f"its head dimension is {' or '.join(map(str, HEAD_DIMS[kernel]))}, not {head_dim}"
    if kernel == "cudnn" and (head_dim % 8 or head_dim > CUDNN_HEAD_DIM[device]):
        return f"its head dimension is a multiple of 8 up to {CUDNN_HEAD_DIM[device]}, not {head_dim}"
    return None
