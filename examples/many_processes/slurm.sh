#!/bin/sh
#SBATCH --job-name=penchant
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
# sbatch examples/many_processes/slurm.sh, from the project's folder, with MODEL in the environment. One task a machine
# runs torchrun, which starts a process a GPU. Three minutes before the time is up SLURM sends SIGTERM to this script: the
# run saves and ends, and the job goes back into the queue, from where the same command goes on.
set -u

FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export FIRST NODES="$SLURM_NNODES" PROCESSES="${SLURM_GPUS_ON_NODE:-8}" RUN="$SLURM_JOB_ID"

TIME_IS_UP=""
trap 'TIME_IS_UP=yes; kill -TERM "$STEP"' TERM
srun --kill-on-bad-exit=1 sh examples/many_processes/node.sh "$@" &
STEP=$!
wait "$STEP"
CODE=$?
if [ -n "$TIME_IS_UP" ]; then # that was the signal; now the end of the step
    wait "$STEP"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$CODE"
