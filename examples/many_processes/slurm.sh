#!/bin/sh
#SBATCH --job-name=penchant
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
# sbatch examples/many_processes/slurm.sh, from the project's folder, with MODEL in the environment. One task a machine
# runs torchrun, which starts a process a GPU. Two minutes before the time is up SLURM sends SIGTERM: the run saves and
# ends; put into the queue again, the same command goes on from there.
set -eu

FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export FIRST NODES="$SLURM_NNODES" PROCESSES="${SLURM_GPUS_ON_NODE:-8}" RUN="$SLURM_JOB_ID"
exec srun --kill-on-bad-exit=1 sh examples/many_processes/node.sh "$@"
