#!/bin/bash
#SBATCH --job-name=resnet50_scl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# sbatch slurm/resnet50_scl.sh                      one node of 8 GPUs
# sbatch --nodes=4 slurm/resnet50_scl.sh            32 ranks, the same global batch
# sbatch --gpus-per-node=0 slurm/resnet50_scl.sh    a cluster without GPUs
# SCL_ARGS="--set method.lam=0.1" sbatch slurm/resnet50_scl.sh
#
# One task per GPU; sbatch's options win over those above. Submit from the root of the checkout.
# The variables (SCL_DATA, SCL_RUNS, SCL_VENV, SCL_CONTAINER …) are listed in docs/cluster.md.
#
# Preempted, requeued or out of time, the job saves, and started again goes on from there. A job
# that has ended can be continued by another: SCL_ARGS="--set run_dir=runs/resnet50_scl-JOBID"
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
export SCL_RECIPE=${SCL_RECIPE:-recipes/resnet50_scl.yaml}
exec bash slurm/train.sh train
