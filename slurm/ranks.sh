#!/bin/bash
# `bash slurm/ranks.sh -m MODULE …` runs Python on every task of the job, each a rank, with the
# recipe, the data and the further arguments that the environment names. See docs/cluster.md.
set -euo pipefail

recipe=${SCL_RECIPE:-recipes/resnet50_scl.yaml}
container=()
if [[ -n ${SCL_CONTAINER:-} ]]; then
    python=${SCL_VENV:+$SCL_VENV/bin/}python3
    runner=$(command -v apptainer || command -v singularity) || {
        echo "error: SCL_CONTAINER is set, and there is neither apptainer nor singularity on" \
            "$(hostname): load its module, or unset SCL_CONTAINER" >&2
        exit 2
    }
    container=("$runner" exec --pwd "$PWD" --bind "$PWD")
    for folder in "${SCL_DATA:-}" "${SCL_RUNS:-}"; do
        if [[ -d $folder ]]; then container+=(--bind "$(realpath "$folder")"); fi
    done
    if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then container+=(--nv); fi
    container+=("$SCL_CONTAINER")
    needed=("$recipe" launcher/train.py)
else
    python=${SCL_VENV:-.venv}/bin/python
    needed=("$recipe" "$python" launcher/train.py)
fi
for file in "${needed[@]}"; do
    if [[ ! -e $file ]]; then
        echo "error: no $file, seen from $PWD: submit from the root of the checkout, after" \
            "making its environment, or set SCL_RECIPE and SCL_VENV" >&2
        exit 2
    fi
done

arguments=(--recipe "$recipe")
if [[ -n ${SCL_DATA:-} ]]; then arguments+=(--set "data.path=$SCL_DATA"); fi
# Words as a shell has them: on any number of lines, a blank within quotes.
if ! xargs -r true <<<"${SCL_ARGS:-}"; then
    echo "error: SCL_ARGS has a quote that nothing closes: $SCL_ARGS" >&2
    exit 2
fi
mapfile -d '' -t more < <(xargs -r printf '%s\0' <<<"${SCL_ARGS:-}")

# The rendezvous is on the first node; the other variables of a rank come from srun's own, and must
# not come from the shell that called sbatch, which may be a rank of something else.
unset RANK LOCAL_RANK WORLD_SIZE
MASTER_ADDR=${SCL_MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Since Slurm 22.05 srun does not take the cores of a task from sbatch: without the option each
# rank, with all its data workers, could be bound to one.
exec srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    "${container[@]}" "$python" "$@" "${arguments[@]}" "${more[@]}"
