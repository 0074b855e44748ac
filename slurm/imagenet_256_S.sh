#!/usr/bin/env bash
# Trains configs/imagenet_256_S.yaml under Slurm: sbatch --export=ALL,DATA=/data/imagenet/train slurm/imagenet_256_S.sh
#
# Five minutes before its time is up the job is told (USR1), writes a checkpoint, ends with code 75 and queues itself
# again, to go on from there. A job that fails for another reason stays failed.
#SBATCH --job-name=imagenet_256_S
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

REPOSITORY=${REPOSITORY:-$SLURM_SUBMIT_DIR}
DATA=${DATA:-$REPOSITORY/imagenet/train}
RUN_DIR=${RUN_DIR:-$REPOSITORY/runs/imagenet_256_S}
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((29500 + SLURM_JOB_ID % 1000))
export MASTER_ADDR MASTER_PORT

cd "$REPOSITORY"
code=0
# One task a GPU: train.py reads rank and size from Slurm. --signal tells the tasks of srun themselves, not this script.
srun --kill-on-bad-exit=1 python train.py --config configs/imagenet_256_S.yaml --data.path "$DATA" \
    --run_dir "$RUN_DIR" || code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
