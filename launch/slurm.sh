#!/bin/bash
# Trains under SLURM, with one process per node and all of its GPUs; requeues itself when stopped.
#
#   sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh configs/deit_s.py WORKDIR [more flags]
#
# SLURM sends SIGTERM two minutes before the time limit, and when a job of higher priority takes the
# nodes. main.py then saves and exits with code 75, and the job requeues itself.
#SBATCH --job-name=vitcompact
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x.%j.log
set -uo pipefail
if [ $# -lt 2 ]; then sed -n '2,4s/^# \{0,1\}//p' "$0"; exit 2; fi
config=$1 workdir=$2
shift 2
coordinator=()
[ "${SLURM_NNODES:-1}" -gt 1 ] && coordinator=(--coordinator=auto)
# Some versions of SLURM do not pass the cores per task from sbatch to srun, which then uses one.
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" .venv/bin/python main.py --config="$config" --workdir="$workdir" \
  "${coordinator[@]}" "$@"
code=$?
case $code in
  75|76|134|137) scontrol requeue "$SLURM_JOB_ID" ;;
  *) exit $code ;;
esac
