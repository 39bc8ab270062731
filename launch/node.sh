#!/bin/bash
# Trains on this machine with all of its devices, and restarts the run until it is done.
#
#   launch/node.sh configs/deit_s.py WORKDIR [more flags of main.py]
#
# On several machines, run it on each with its own process_id and the address of the first:
#
#   launch/node.sh CONFIG WORKDIR --coordinator=HOST:1234 --num_processes=2 --process_id=0
#
# A run that was stopped or killed, or that lost another process, is restarted. A run that failed
# with an error is not, nor is one that SIGTERM or Ctrl-C to this script ended.
set -uo pipefail
if [ $# -lt 2 ]; then sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; fi
config=$1 workdir=$2
shift 2
python=${PYTHON:-.venv/bin/python}
child=
stopping=
trap 'stopping=1; [ -n "$child" ] && kill -TERM "$child" 2>/dev/null' TERM INT
while true; do
  "$python" main.py --config="$config" --workdir="$workdir" "$@" &
  child=$!
  [ -n "$stopping" ] && kill -TERM "$child" 2>/dev/null   # a signal came before $child was set
  wait "$child"; code=$?
  while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done   # a trap interrupts wait
  [ -n "$stopping" ] && exit "$code"
  case $code in
    75|76|134|137|143)
      echo "ended with exit code $code; resuming from the newest checkpoint"
      sleep "${PAUSE:-5}" ;;
    *) exit "$code" ;;
  esac
done
