#!/usr/bin/env bash
#SBATCH --job-name=finetune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# An example for Slurm. From this repository's folder: sbatch scripts/finetune_slurm.sh --data_path … (any flag of
# finetune_task_lora.sh). One task a node starts that node's processes; a job that is requeued resumes where it was.
set -euo pipefail

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export NNODES=$SLURM_NNODES NUM_GPUS=$SLURM_GPUS_ON_NODE
# shellcheck disable=SC2016 # each task knows its own SLURM_NODEID
srun bash -c 'NODE_RANK=$SLURM_NODEID exec bash scripts/finetune_task_lora.sh --resume auto "$@"' task "$@"
