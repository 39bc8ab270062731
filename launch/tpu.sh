#!/bin/bash
# Trains on Cloud TPU: one host or a whole slice, on demand or spot. Run it on your own machine.
#
#   launch/tpu.sh NAME ZONE TYPE CONFIG WORKDIR [more flags of main.py]
#   launch/tpu.sh deit us-central2-b v4-32 configs/deit_s.py /mnt/runs/deit_s
#
# SPOT=1 requests a spot slice, AUTOCHECKPOINT=1 a SIGTERM before maintenance. WORKDIR and data must
# be directories that every host of the slice sees (docs/scale.md). The script requests a preempted
# slice again and restarts a run that was stopped. It gives up after three consecutive failures
# within five minutes each.
set -euo pipefail
if [ $# -lt 5 ]; then sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; fi
name=$1 zone=$2 type=$3 config=$4 workdir=$5
shift 5
version=${VERSION:-tpu-ubuntu2204-base}
repository=${REPOSITORY:-$(git config --get remote.origin.url)}
commit=${COMMIT:-$(git rev-parse HEAD)}
options=(--accelerator-type="$type" --version="$version")
[ -n "${SPOT:-}" ] && options+=(--spot)
[ -n "${AUTOCHECKPOINT:-}" ] && options+=(--autocheckpoint-enabled)
[ -n "${DISK:-}" ] && options+=(--data-disk="$DISK")   # source=projects/...,mode=read-only

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

state() {
  gcloud compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(state)' 2>/dev/null ||
    echo MISSING
}

prepare() {
  # Some images have Python 3.10, which is too old: uv installs 3.12.
  on_all_hosts "
    set -e
    [ -d vitcompact ] || git clone --quiet '$repository' vitcompact
    cd vitcompact && git fetch --quiet && git checkout --quiet '$commit'
    [ -d .venv ] || { python3 -m pip install --quiet --user uv;
                      python3 -m uv venv --quiet --seed --python 3.12 .venv; }
    .venv/bin/pip install --quiet -r requirements.txt 'jax[tpu]==0.10.2'
    ${MOUNT:-true}"
}

failures=0
prepared=
more=$([ $# = 0 ] || printf ' %q' "$@")   # quoted again for the shells of the hosts
while true; do
  case $(state) in
    READY) ;;
    MISSING)
      prepared=
      gcloud compute tpus tpu-vm create "$name" --zone="$zone" "${options[@]}" ||
        { sleep "${PAUSE:-60}"; continue; } ;;
    PREEMPTED|TERMINATED|STOPPED)
      gcloud compute tpus tpu-vm delete "$name" --zone="$zone" --quiet ||
        sleep "${PAUSE:-60}"
      continue ;;
    *) sleep "${PAUSE:-20}"; continue ;;
  esac
  code=0 begin=$SECONDS
  if [ -z "$prepared" ]; then prepare && prepared=1 || code=$?; fi
  if [ "$code" = 0 ]; then
    on_all_hosts "cd vitcompact && .venv/bin/python main.py --config='$config' \
      --workdir='$workdir' --coordinator=auto$more" || code=$?
  fi
  if [ "$code" = 0 ]; then
    echo "done; delete the slice with: gcloud compute tpus tpu-vm delete $name --zone=$zone"
    exit 0
  fi
  if ((SECONDS - begin < 300)); then failures=$((failures + 1)); else failures=0; fi
  if ((failures == 3)); then echo "failed three times, last with exit code $code"; exit "$code"; fi
  echo "ended with exit code $code; resuming from the newest checkpoint"
  sleep "${PAUSE:-10}"
done
