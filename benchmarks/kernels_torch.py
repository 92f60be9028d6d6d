"""torch's SDPA for benchmarks/kernels.py, which starts this and reads the last line: a JSON list of its rows.

python -m benchmarks.kernels_torch '[[[D, T, rows, [H, K]], ...], repeats, small, layers]'
"""

import json
import statistics
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {"torch SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "torch SDPA flash": SDPBackend.FLASH_ATTENTION}


def inputs(rows: int, heads, length: int, head_dim: int, layers: int = 1):
    """q, do, k, v, k, v, ...: [B, H, T, D] that lie as [B, T, H, D]."""
    H, K = heads
    shapes = [(rows, length, n, head_dim) for n in (H, H, *[K] * 2 * layers)]
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for shape in shapes]


def attend(q, k, v):
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def forward(q, *kv, attend=attend):
    for k, v in zip(kv[::2], kv[1::2]):
        q = attend(q, k, v)
    return q


def gradients(q, do, *kv, attend=attend):
    q, *kv = (x.detach().requires_grad_() for x in (q, *kv))
    o = forward(q, *kv, attend=attend)
    return o.detach(), *torch.autograd.grad(o, (q, *kv), do)


def dense(q, k, v):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    s = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    hidden = torch.ones(s.shape[-2:], device=s.device, dtype=torch.bool).triu(1)
    return s.masked_fill(hidden, float("-inf")).softmax(-1) @ v


def errors(heads, small: int, head_dim: int) -> list[float]:
    given = inputs(2, heads, small, head_dim)
    expected = gradients(*(x.double() for x in given), attend=dense)
    return [((a - b).norm() / b.norm()).item() for a, b in zip(gradients(*given), expected)]


def milliseconds(run, repeats: int) -> float:
    for _ in range(3):
        run()
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            run()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / 10)
    return statistics.median(found)


def measure(name, backend, case, repeats: int, small: int, layers: int) -> list:
    D, T, rows, heads = case
    try:
        with sdpa_kernel(backend):
            wrong = errors(heads, small, D)
            q, do, *kv = inputs(rows, heads, T, D, layers)
            with torch.no_grad():
                alone = milliseconds(lambda: forward(q, *kv), repeats) / layers
            both = milliseconds(lambda: gradients(q, do, *kv), repeats) / layers
    except RuntimeError as error:
        return ["whole", D, T, name, *[None] * 8, str(error).splitlines()[0][:160]]
    flops = 4 * rows * T * T / 2 * heads[0] * D
    return ["whole", D, T, name, flops / alone / 1e9, 3.5 * flops / both / 1e9, alone, both, *wrong, None]


def main() -> None:
    cases, repeats, small, layers = json.loads(sys.argv[1])
    if not torch.cuda.is_available():
        raise SystemExit("torch has no CUDA here")
    print(json.dumps([measure(*which, case, repeats, small, layers) for case in cases for which in BACKENDS.items()]))


if __name__ == "__main__":
    main()
