#!/usr/bin/env bash
# On TPU slices or GPU hosts of a GKE cluster through xpk, from an image that holds the checkout in its working folder:
#   CLUSTER=c ZONE=z PROJECT=p IMAGE=i NAME=run1 STORAGE=runs launch/gke_xpk.sh --tpu-type=v5p-32 -- mesh.fsdp=16
#   ... launch/gke_xpk.sh --device-type=h100-mega-80gb-8 --num-nodes=2 -- mesh.fsdp=16
# STORAGE: a Filestore volume attached to the cluster with --mount-point=/runs (xpk storage create): checkpoints need a
# file system that renames, which buckets do not. A run that lost a process ends with 1, an evicted one with 75: both
# are started again and go on from their checkpoint.
set -euo pipefail
: "${CLUSTER:?}" "${ZONE:?}" "${PROJECT:?}" "${IMAGE:?}" "${NAME:?}" "${STORAGE:?}"
machines=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  machines+=("$1")
  shift
done
[ $# -eq 0 ] || shift
exec xpk workload create --workload="$NAME" --cluster="$CLUSTER" --zone="$ZONE" --project="$PROJECT" \
  --docker-image="$IMAGE" --storage="$STORAGE" "${machines[@]}" \
  --max-restarts=20 --restart-on-exit-codes=1,75 --termination-grace-period-seconds=120 \
  --command="launch/start.sh /runs/$NAME $*"
