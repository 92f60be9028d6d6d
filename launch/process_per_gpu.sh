#!/usr/bin/env bash
# On GPUS (default 8) of a host with a process for each: eight interpreters read and grade rows side by side. Give each
# its part of the host's cores: rubric.workers=-1 would start one grader a core in every process.
#   launch/process_per_gpu.sh RUN_DIR rubric.workers=4 [key=value ...]
set -euo pipefail
export JAX_NUM_PROCESSES=${GPUS:-8} JAX_COORDINATOR_ADDRESS=${COORDINATOR:-127.0.0.1:8476}
pids=()
# a signal to this script is one to the run: it saves and ends with 75
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < JAX_NUM_PROCESSES; i++)); do
  JAX_PROCESS_ID=$i JAX_LOCAL_DEVICE_IDS=$i "$(dirname "$0")/start.sh" "$@" &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" && ended=0 || ended=$?; done # a trapped signal interrupts wait
  [ "${ended:-0}" -eq 0 ] || code=$ended
done
exit "$code"
