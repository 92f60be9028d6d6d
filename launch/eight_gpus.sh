#!/usr/bin/env bash
# On all GPUs of a host, usually eight, with one process: the simplest, and JAX's default.
#   launch/eight_gpus.sh RUN_DIR mesh.fsdp=8 [key=value ...]
set -euo pipefail
exec "$(dirname "$0")/start.sh" "$@"
