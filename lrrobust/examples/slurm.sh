#!/bin/bash
# One evaluation on 16 GPUs of four nodes: sbatch slurm.sh
# The processes share the work through the run's folder, so it must lie on a file system that all nodes see. Killed or
# out of time, the same script goes on from there, with any number of nodes.
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue

export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
srun bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS exec lrrobust eval \
    --model lr_resnet50 --suite standard --dataset "$SHARED/imagenet/val" --out "$SHARED/runs"'
