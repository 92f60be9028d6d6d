"""torch's SDPA for benchmarks/kernels.py, which starts this and asks, so that both are timed in turns.

    python -m benchmarks.kernels_torch [--tiny]

A line of stdin is a request, [what, *arguments] in JSON, and answered by one line of stdout: {"result": ...} or
{"error": why}. What: a method of Server. The end of stdin ends it. --tiny: on the CPU where torch has no CUDA.
"""

import functools
import json
import os
import sys
import time
import traceback

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {
    "cuda": {"torch SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "torch SDPA flash": SDPBackend.FLASH_ATTENTION},
    "cpu": {"torch SDPA math": SDPBackend.MATH},
}


def inputs(device: str, rows: int, heads, length: int, head_dim: int, layers: int = 1):
    """q, do, k, v, k, v, ...: [B, H, T, D] that lie as [B, T, H, D]."""
    H, K = heads
    shapes = [(rows, length, n, head_dim) for n in (H, H, *[K] * 2 * layers)]
    return [torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(1, 2) for shape in shapes]


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


def seconds_on_gpu(run, calls: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def seconds_on_cpu(run, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


class Server:
    """What can be asked for. Its one state is the case at hand: of each backend, forward and forward and backward."""

    def __init__(self, device: str):
        self.device, self.ways = device, {}

    def names(self) -> list[str]:
        return list(BACKENDS[self.device])

    def errors(self, name: str, heads, length: int, head_dim: int) -> list[float]:
        """Of o, dq, dk and dv, against dense float64 attention."""
        given = inputs(self.device, 2, heads, length, head_dim)
        expected = gradients(*(x.double() for x in given), attend=dense)
        with sdpa_kernel(BACKENDS[self.device][name]):
            found = gradients(*given)
        return [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected)]

    def prepare(self, name: str, rows: int, heads, length: int, head_dim: int, layers: int) -> None:
        q, do, *kv = inputs(self.device, rows, heads, length, head_dim, layers)
        ways = [functools.partial(torch.no_grad()(forward), q, *kv), functools.partial(gradients, q, do, *kv)]
        with sdpa_kernel(BACKENDS[self.device][name]):
            for run in ways * 3:
                run()
        self.ways[name] = ways

    def time(self, name: str, way: int, calls: int) -> float:
        """Seconds of one of `calls` runs, forward (way 0) or forward and backward (1).

        One more goes before them, untimed: the GPU has to come back from the other process.
        """
        run, on_gpu = self.ways[name][way], self.device == "cuda"
        with sdpa_kernel(BACKENDS[self.device][name]):
            run()
            return (seconds_on_gpu if on_gpu else seconds_on_cpu)(run, calls)

    def forget(self) -> None:
        self.ways.clear()
        torch.cuda.empty_cache()


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu" if "--tiny" in sys.argv[1:] else None
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what torch and its libraries print goes to stderr
    server = Server(device)
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        try:
            if device is None:
                raise RuntimeError("torch has no CUDA here")
            answer = {"result": getattr(server, what)(*arguments)}
        except Exception as error:  # of any kind: the other kernels' rows do not depend on this one
            traceback.print_exc()
            answer = {"error": (str(error).splitlines() or [type(error).__name__])[0]}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
