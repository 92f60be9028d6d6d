"""Tokens a second of the rollout engine, beside transformers' generate at the same work, in the same run.

    python -m benchmarks.rollout [--rows 512] [--prompt 128] [--new 128] [--repeats 3] [--no-torch]

Random weights in SmolLM2-135M's shape; every row generates exactly --new tokens at temperature 1, bfloat16 on an
accelerator. The roofline counts, for each decoding step, one reading of the weights and of the keys and values so far.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from transformers import LlamaConfig

from infinite_jax.rollout import Sampling, generate
from models import policy
from models.architectures import from_hf, unrolls

SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rope_theta=100_000.0,
    tie_word_embeddings=True,
)
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}  # bytes/s, the vendor's datasheet (SXM)


def timed(run, repeats: int) -> float:
    run()  # compiles, or fills the caches
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def ours(config, params, rows: int, group: int, prompt: int, new: int, repeats: int) -> float:
    rng = np.random.default_rng(0)
    prompt_PT = jnp.asarray(rng.integers(10, config.vocab_size, (rows // group, prompt)), jnp.int32)
    length_P = jnp.full(rows // group, prompt, jnp.int32)
    sampling = Sampling(1.0, 0, 1.0, new, group, (-1,), 0)
    keys = iter(jax.random.split(jax.random.key(0), repeats + 1))

    def run():
        jax.block_until_ready(generate(config, sampling, params, prompt_PT, length_P, next(keys)))

    return timed(run, repeats)


def theirs(rows: int, prompt: int, new: int, repeats: int) -> float:
    import torch
    from transformers import LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = LlamaForCausalLM(SMOLLM2_135M).to(device, dtype).eval()
    ids = torch.randint(10, SMOLLM2_135M.vocab_size, (rows, prompt), device=device)

    def run():
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                min_new_tokens=new,
                max_new_tokens=new,
                pad_token_id=0,
            )
        if device == "cuda":
            torch.cuda.synchronize()

    return timed(run, repeats)


def roofline(config, rows: int, group: int, prompt: int, new: int) -> float | None:
    """Seconds that the bytes of all decoding steps take at the device's bandwidth; None on an unknown device."""
    kind = jax.devices()[0].device_kind
    bandwidth = next((value for name, value in BANDWIDTH.items() if name in kind), None)
    if bandwidth is None:
        return None
    weights = 2 * sum(x.size for x in jax.tree.leaves(policy.abstract_params(config)))
    token = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim  # bytes of keys and values
    cache = token * (rows // group * prompt + rows * (new + 1) / 2)
    return new * (weights + cache) / bandwidth


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__.splitlines()[0])
    for name, default in (("rows", 512), ("prompt", 128), ("new", 128), ("repeats", 3)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    arguments.add_argument("--no-torch", action="store_true", help="leave transformers out")
    given = arguments.parse_args()
    work = (given.prompt, given.new, given.repeats)
    config = from_hf(SMOLLM2_135M)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    config = dataclasses.replace(config, dtype=dtype, unrolled=unrolls(jax.default_backend()))
    params = jax.jit(lambda key: policy.sampled(config, policy.init(config, key)))(jax.random.key(0))
    tokens = given.rows * given.new
    rows = [
        (f"this engine, {given.rows // g} prompts x {g}", g, ours(config, params, given.rows, g, *work)) for g in (1, 8)
    ]
    if not given.no_torch:
        rows.append(("transformers generate", 1, theirs(given.rows, *work)))
    device = jax.devices()[0].device_kind
    print(f"{device}, {given.rows} rows, {given.prompt} + {given.new} tokens, median of {given.repeats}")
    print("| engine | seconds | tokens/s | ms a step | share of the bandwidth roofline |\n|---|---|---|---|---|")
    for name, group, seconds in rows:
        bound = roofline(config, given.rows, group, given.prompt, given.new)
        share = "-" if bound is None else f"{bound / seconds:.2f}"
        print(f"| {name} | {seconds:.2f} | {tokens / seconds:,.0f} | {1e3 * seconds / given.new:.2f} | {share} |")


if __name__ == "__main__":
    main()
