#!/usr/bin/env bash
# On one GPU of a host; GPU=3 takes another than the first.
#   launch/one_gpu.sh RUN_DIR [key=value ...]
set -euo pipefail
CUDA_VISIBLE_DEVICES=${GPU:-0} exec "$(dirname "$0")/start.sh" "$@"
