#!/usr/bin/env bash
# Trains on the GPUs of a SLURM cluster. From the folder of the repository:
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=8 --time=24:00:00 \
#       launch/slurm.sh ARGUMENTS OF sddit_jax.main
#
# SLURM starts one process for each GPU, since JAX gives each process of SLURM one GPU. Environment variables:
#
#   SDDIT_VENV               folder of a virtual environment; default: python of the PATH
#   SDDIT_CONTAINER          image, run by srun's --container-image (Pyxis)
#   SDDIT_CONTAINER_MOUNTS   mounts SOURCE:TARGET,... beside this folder and the workdir, which are always mounted
#   SDDIT_RETRIES            give up when more runs in a row end without a new checkpoint; default 5
#
# Exit codes 0, 2 and 3 of sddit_jax.main end the job. After any other exit code SLURM queues the job again. Two minutes
# before the time limit the run gets SIGTERM and saves, and SLURM queues the job again. scancel ends it.
#SBATCH --job-name=sddit_jax
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
set -euo pipefail
if [[ ! ${SLURM_JOB_ID:-} || ! -f ${SLURM_SUBMIT_DIR:-}/launch/common.sh ]]; then
  echo "error: start this from the folder of the repository: sbatch [OPTIONS] launch/slurm.sh ARGUMENTS" >&2
  exit 2
fi
# SLURM runs a copy of this file in another folder.
cd "$SLURM_SUBMIT_DIR"
# shellcheck source=launch/common.sh
source launch/common.sh

workdir=$(workdir_of "$@")
retries=${SDDIT_RETRIES:-5}
[[ $retries =~ ^[0-9]+$ ]] || fail "SDDIT_RETRIES=$retries is not a number"
gpus=${SLURM_GPUS_ON_NODE:-0}
((gpus)) || fail "the job has no GPUs: sbatch --gpus-per-node=N"
processes=$((SLURM_JOB_NUM_NODES * gpus))
((${SLURM_NTASKS:-1} == processes)) ||
  fail "${SLURM_NTASKS:-1} tasks for $processes GPUs, but each needs one: sbatch --ntasks-per-node=$gpus"

# Every process sees all GPUs of its node, as JAX expects and NCCL needs. When one process fails, srun does not end the
# others, which may be saving: JAX ends them when it misses the process, or srun after ten minutes.
launch=(srun --gpu-bind=none --kill-on-bad-exit=0 --wait=600)
if [[ ${SLURM_CPUS_PER_TASK:-} ]]; then
  launch+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
fi
python=python
if [[ ${SDDIT_CONTAINER:-} ]]; then
  mkdir -p "$workdir"
  folder=$(cd "$workdir" && pwd)
  launch+=(--container-image="$SDDIT_CONTAINER" --container-workdir="$PWD")
  launch+=(--container-mounts="$PWD:$PWD,$folder:$folder${SDDIT_CONTAINER_MOUNTS:+,$SDDIT_CONTAINER_MOUNTS}")
elif [[ ${SDDIT_VENV:-} ]]; then
  python=$SDDIT_VENV/bin/python
  [[ -x $python ]] || fail "SDDIT_VENV=$SDDIT_VENV: there is no $python"
fi

# SIGTERM to srun would kill the processes at once. scancel --signal sends it to them, and not to this script.
trap 'signalled=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
"${launch[@]}" "$python" -m sddit_jax.main --distributed=auto "$@" &
wait_for $!
if is_final "$code"; then
  exit "$code"
fi

# A job that is cancelled is not RUNNING, and neither is one that SLURM preempts; SLURM queues that one again itself.
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
if [[ $state != RUNNING ]]; then
  echo "exit code $code, and the job is $state: not queued again" >&2
  exit "$code"
fi
# The file has the job, the newest step at its last end, and how many runs in a row ended without a new checkpoint.
record=$workdir/slurm_restarts
job="" best=-1 failures=0
if [[ -f $record ]]; then
  read -r job best failures <"$record"
fi
[[ $job == "$SLURM_JOB_ID" ]] || best=-1 failures=0
if gave_up "$workdir" "$retries"; then
  exit 1
fi
mkdir -p "$workdir"
echo "$SLURM_JOB_ID $best $failures" >"$record"
echo "exit code $code, newest checkpoint $step: queued again ($failures of $retries)" >&2
scontrol requeue "$SLURM_JOB_ID"
