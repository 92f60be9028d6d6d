#!/usr/bin/env bash
# On a TPU-VM slice, one process a host; JAX finds the others from the machines' metadata. Every host has the checkout in
# ~/infinite_jax with its environment in .venv (pip install -e '.[tpu]' -c constraints.txt), and RUN_DIR lies on a file
# system that all of them mount, such as Filestore.
#   TPU=my-slice ZONE=us-east5-a launch/tpu_vm.sh RUN_DIR mesh.fsdp=16 [key=value ...]
set -euo pipefail
: "${TPU:?name the slice: TPU=...}" "${ZONE:?name its zone: ZONE=...}"
printf -v arguments ' %q' "$@" # as one word each on the other side
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd ~/infinite_jax && source .venv/bin/activate && launch/start.sh$arguments"
