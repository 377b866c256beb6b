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
#   SCL_RECIPE   recipe                     (default: recipes/resnet50_scl.yaml)
#   SCL_DATA     folder of the shards       (default: the recipe's data.path)
#   SCL_RUNS     folder of the runs         (default: runs)
#   SCL_VENV     virtual environment        (default: .venv)
#   SCL_ARGS     more arguments of launcher/train.py
#   MASTER_PORT  rendezvous port            (default: from the job's number)
#
# Preempted, requeued or out of time, the job saves, and started again goes on from there. A job
# that has ended can be continued by another: SCL_ARGS="--set run_dir=runs/resnet50_scl-JOBID"
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-.}"
recipe=${SCL_RECIPE:-recipes/resnet50_scl.yaml}
python=${SCL_VENV:-.venv}/bin/python
for needed in "$recipe" "$python" launcher/train.py; do
    if [[ ! -e $needed ]]; then
        echo "error: no $needed, seen from $PWD: submit from the root of the checkout, after" \
            "making its environment, or set SCL_RECIPE and SCL_VENV" >&2
        exit 2
    fi
done

arguments=(--recipe "$recipe" --set "run_dir=${SCL_RUNS:-runs}/${SLURM_JOB_NAME:-resnet50_scl}-$SLURM_JOB_ID")
if [[ -n ${SCL_DATA:-} ]]; then
    arguments+=(--set "data.path=$SCL_DATA")
fi
read -r -a more <<<"${SCL_ARGS:-}"

# The rendezvous is on the first node; the other variables of a rank come from srun's own, and must
# not come from the shell that called sbatch, which may be a rank of something else.
unset RANK LOCAL_RANK WORLD_SIZE
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# A dead rank ends the step at once. Since Slurm 22.05 srun does not take the cores of a task from
# sbatch: without the option each rank, with all its data workers, could be bound to one.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    "$python" -m launcher.train "${arguments[@]}" "${more[@]}" &
step=$!

# Slurm's notice that time is running out (--signal): srun passes it on, the ranks save and stop.
# The step's exit code does not tell: the first rank to stop makes srun terminate the slower ones.
noticed=
trap 'noticed=1; kill -USR1 "$step"' USR1
code=0
wait "$step" || code=$?
if [[ $noticed ]]; then
    # It was the notice that ended the wait, not the step.
    code=0
    wait "$step" || code=$?
    # By a task's own number: that of an array's first task means all of them. Not for ever: a time
    # limit that is too short to get anywhere would be met again and again.
    if ((code != 0 && ${SLURM_RESTART_COUNT:-0} < 20)); then
        scontrol requeue \
            "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}" || true
    fi
fi
exit "$code"
