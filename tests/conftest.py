"""Tests run on the CPU, whatever the machine has, and compile each program once a session."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

_cache = tempfile.TemporaryDirectory(prefix="infinite_jax_compiled_")
jax.config.update("jax_compilation_cache_dir", _cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
