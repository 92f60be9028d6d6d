#!/usr/bin/env bash
# Starts a run, or continues it where it has begun: what a job that may be restarted should do. One process of it.
#   launch/start.sh RUN_DIR [arguments of train, which only the first start reads]
set -euo pipefail
run_dir=${1:?usage: launch/start.sh RUN_DIR [key=value ...]}
shift
if [ -f "$run_dir/config.yaml" ]; then
  exec python -m infinite_jax.resume "$run_dir"
fi
exec python -m infinite_jax.train "run.dir=$run_dir" "$@"
