"""GPUs to compile for on a machine that has none: what a program needs of them is known before they are lent.

Needs jax >= 0.11 with its CUDA plugin (pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt of jax's version),
JAX_PLATFORMS=cpu, and ptxas in /usr/local/cuda/bin. Compiled without autotuning, and without the scratch memory that
cuDNN asks for once it is there. The numbers are the makers' data sheets.
"""

import re

import jax
from jax.experimental import topologies

CHIPS = {
    "H100": ("NVIDIA H100 80GB HBM3", 84942979072, 3352320000000),  # name, bytes of memory, bytes/s
    "H200": ("NVIDIA H200", 150754820096, 4800000000000),
}
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_memory_size: {memory} memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a" device_address_bits: 64
  pcie_bandwidth: 34359738368 ecc_enabled: true name: "{name}"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
  device_interconnect_info {{ active_links: 18 }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{name}"
"""


def devices(topology: str) -> tuple[list[jax.Device], int]:
    """Compile-only devices of a topology such as "H200:2", all of one host, and the bytes of memory of each.

    Raises ValueError for another name, NotImplementedError where jax's CUDA plugin is not installed.
    """
    chip, _, number = topology.partition(":")
    if chip not in CHIPS or not re.fullmatch(r"[1-9]\d*", number):
        raise ValueError(f"topology {topology!r}: expected <chip>:<devices> with a chip of {', '.join(CHIPS)}")
    name, memory, bandwidth = CHIPS[chip]
    target = TARGET.format(name=name, memory=memory, bandwidth=bandwidth)
    found = topologies.get_topology_desc(chip, "cuda", target_config=target, topology=f"1x1x{number}")
    return list(found.devices), memory
