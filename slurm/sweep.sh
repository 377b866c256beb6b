#!/bin/bash
#SBATCH --job-name=sweep
#SBATCH --array=0
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
#
# export SCL_SWEEP=recipes/imagenet/sweep.yaml
# scl sweep "$SCL_SWEEP" --dry-run                  lists the runs, and says which --array they are
# sbatch --array=0-11 slurm/sweep.sh
#
# Task i trains the i-th run of the sweep, whatever it varies, in the folder that `scl sweep` would
# give it: submitted again, what is finished is left alone and the rest goes on. Other variables as
# for slurm/resnet50_scl.sh.
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
if [[ -z ${SCL_SWEEP:-} ]]; then
    echo "error: SCL_SWEEP is not set: export SCL_SWEEP=recipes/imagenet/sweep.yaml, or another" >&2
    exit 2
fi
exec bash slurm/train.sh sweep --task "${SLURM_ARRAY_TASK_ID:-0}"
