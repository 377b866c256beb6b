#!/bin/bash
#SBATCH --job-name=doctor
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=10
#SBATCH --output=%x-%j.log
#
# sbatch --nodes=4 slurm/doctor.sh
#
# Checks the nodes, the data and the network before a long job is queued: same options and
# variables as for slurm/resnet50_scl.sh. Exit code 1, and a list of what to mend, if something is
# wrong.
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
# Every rank is to speak, whatever the first one says.
export SLURM_KILL_BAD_EXIT=0
export SCL_RUN=${SLURM_JOB_NAME:-doctor}-$SLURM_JOB_ID
exec bash slurm/ranks.sh doctor --cluster
