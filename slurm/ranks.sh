#!/bin/bash
# `bash slurm/ranks.sh train …` runs `scl train …` on every task of the job, each a rank, with the
# recipe, the data and the further arguments that the environment names; so for `doctor --cluster`
# and `sweep`. See docs/cluster.md.

# Before -e and -u, which modules and conda are not made for.
if [[ -n ${SCL_SETUP:-} ]]; then
    # shellcheck source=/dev/null
    source "$(realpath "$SCL_SETUP")" || {
        echo "error: SCL_SETUP=$SCL_SETUP, seen from $PWD, is not there or ended with a failure" >&2
        exit 2
    }
fi
set -euo pipefail

recipe=${SCL_RECIPE:-recipes/resnet50_scl.yaml}
folders=("$PWD")
for folder in "${SCL_DATA:-}" "${SCL_RUNS:-}"; do
    if [[ -d $folder ]]; then folders+=("$(realpath "$folder")"); fi
done
task=() container=()
bin=${SCL_VENV:+$SCL_VENV/bin/}
if [[ -n ${SCL_CONTAINER:-} && -n ${SCL_PYXIS:-} ]]; then
    echo "error: SCL_CONTAINER and SCL_PYXIS are both set: unset the one that is not meant" >&2
    exit 2
elif [[ -n ${SCL_CONTAINER:-} ]]; then
    runner=$(command -v apptainer || command -v singularity) || {
        echo "error: SCL_CONTAINER is set, and there is neither apptainer nor singularity on" \
            "$(hostname): load its module in SCL_SETUP, or unset SCL_CONTAINER" >&2
        exit 2
    }
    container=("$runner" exec --pwd "$PWD")
    for folder in "${folders[@]}"; do container+=(--bind "$folder"); done
    if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then container+=(--nv); fi
    container+=("$SCL_CONTAINER")
elif [[ -n ${SCL_PYXIS:-} ]]; then
    if ! srun --help | grep -q -e --container-image; then
        echo "error: SCL_PYXIS is set, and srun on $(hostname) has no --container-image: the" \
            "plugin pyxis is not installed; SCL_CONTAINER is for apptainer" >&2
        exit 2
    fi
    mounts=$PWD:$PWD
    for folder in "${folders[@]:1}"; do mounts+=,$folder:$folder; done
    task=(--container-image="$SCL_PYXIS" --container-workdir="$PWD" --container-mounts="$mounts")
else
    bin=${bin:-.venv/bin/}
fi

# The checkout from whose root the job was submitted; elsewhere, what is installed.
if [[ -e launcher/train.py ]]; then
    program=("${bin}python3" -m launcher.cli "$1")
    if [[ $1 == train ]]; then program=("${bin}python3" -m launcher.train); fi
    if [[ $1 == sweep ]]; then needed=("$SCL_SWEEP"); else needed=("$recipe"); fi
else
    program=("${bin}scl" "$1")
    needed=()
fi
if [[ $bin && -z ${SCL_CONTAINER:-}${SCL_PYXIS:-} ]]; then needed+=("${program[0]}"); fi
for file in "${needed[@]}"; do
    if [[ ! -e $file ]]; then
        echo "error: no $file, seen from $PWD: submit from the root of the checkout, after" \
            "making its environment, or set SCL_RECIPE and SCL_VENV" >&2
        exit 2
    fi
done

arguments=("${@:2}")
if [[ $1 == sweep ]]; then
    arguments=("$SCL_SWEEP" "${arguments[@]}" ${SCL_RUNS:+--runs "$SCL_RUNS"})
else
    arguments=(--recipe "$recipe" --set "run_dir=${SCL_RUNS:-runs}/$SCL_RUN" "${arguments[@]}")
fi
# A step of one task is one rank, whatever the recipe says of those of one machine.
if [[ -n ${SLURM_NTASKS:-} ]]; then arguments+=(--set "engine.ranks=$SLURM_NTASKS"); fi
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
# rank, with all its data workers, could be bound to one. What SCL_SETUP has changed goes along.
exec srun --export=ALL --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${task[@]}" \
    "${container[@]}" "${program[@]}" "${arguments[@]}" "${more[@]}"
