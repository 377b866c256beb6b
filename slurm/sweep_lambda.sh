#!/bin/bash
#SBATCH --job-name=sweep_lambda
#SBATCH --array=0-3
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
# SCL_LAMBDAS="0.02 0.05 0.1" sbatch --array=0-2 slurm/sweep_lambda.sh
# sbatch --array=0-3%1 slurm/sweep_lambda.sh        one run at a time
#
# Task i trains with the i-th λ, in runs/sweep_lambda-JOBID/lam<λ>; one W&B group for all. Each task
# is requeued for itself. Other variables as for slurm/resnet50_scl.sh.
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
export SCL_RECIPE=${SCL_RECIPE:-recipes/resnet50_scl.yaml}
# On any number of lines; the end of the text is no failure.
read -r -d '' -a lambdas <<<"${SCL_LAMBDAS:-0.02 0.05 0.1 0.2}" || true
lambda=${lambdas[${SLURM_ARRAY_TASK_ID:-0}]:-}
if [[ -z $lambda ]]; then
    echo "error: task ${SLURM_ARRAY_TASK_ID:-0} of the array has no λ, SCL_LAMBDAS holds" \
        "${#lambdas[@]}: submit with --array=0-$((${#lambdas[@]} - 1))" >&2
    exit 2
fi
sweep=${SLURM_JOB_NAME:-sweep_lambda}-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}
export SCL_RUN=$sweep/lam$lambda
exec bash slurm/train.sh train --set "method.lam=$lambda" --set "name=lam$lambda" \
    --set "tracking.group=$sweep"
