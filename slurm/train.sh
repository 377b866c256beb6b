#!/bin/bash
# What the jobs have in common: `bash slurm/train.sh train …` or `… sweep …` runs `scl train …` or
# `scl sweep …` as the ranks of the job, which save and are requeued when time runs out. Called by
# the scripts that sbatch is given, never by hand.
set -euo pipefail

# A dead rank ends the step at once.
export SLURM_KILL_BAD_EXIT=1
export SCL_RUN=${SCL_RUN:-${SLURM_JOB_NAME:-scl}-$SLURM_JOB_ID}
bash slurm/ranks.sh "$@" &
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
