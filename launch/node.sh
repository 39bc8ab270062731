#!/bin/bash
# Trains on this machine with all of its devices, and goes on until the run is done.
#
#   launch/node.sh configs/deit_s.py WORKDIR [main.py's other flags]
#
# Several machines: on each of them, with its own number, and the first one's address:
#
#   launch/node.sh CONFIG WORKDIR --coordinator=HOST:1234 --num_processes=2 --process_id=0
#
# Starts again what was stopped or lost another process, and what was killed; not what SIGTERM or
# Ctrl-C at this script itself ended, nor a mistake.
set -uo pipefail
if [ $# -lt 2 ]; then sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; fi
config=$1 workdir=$2
shift 2
python=${PYTHON:-.venv/bin/python}
child=
asked=
trap 'asked=1; [ -n "$child" ] && kill -TERM "$child" 2>/dev/null' TERM INT
while true; do
  "$python" main.py --config="$config" --workdir="$workdir" "$@" &
  child=$!
  [ -n "$asked" ] && kill -TERM "$child" 2>/dev/null   # asked before the child had a name
  wait "$child"; code=$?
  while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done   # a trap interrupts wait
  [ -n "$asked" ] && exit "$code"
  case $code in
    75|76|134|137|143)
      echo "ended with $code; going on from the newest checkpoint"
      sleep "${PAUSE:-5}" ;;
    *) exit "$code" ;;
  esac
done
