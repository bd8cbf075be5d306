# What the scripts of this folder share. Sourced, not run.
# shellcheck shell=bash

# A mistake of the user: one line, exit code 2.
fail() {
  echo "error: $*" >&2
  exit 2
}

# The arguments as one line that a shell reads as the same arguments.
quote() {
  local word separator="" mark="'"
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      word="'${word//$mark/$mark\\$mark$mark}'"
    fi
    printf '%s%s' "$separator" "$word"
    separator=" "
  done
}

# Runs a command; with dry_run=1 prints it instead.
run() {
  if [[ ${dry_run:-0} == 1 ]]; then
    quote "$@"
    echo
  else
    "$@"
  fi
}

# Prints the run's folder, --workdir=FOLDER among main's arguments, and fails for arguments that main cannot run with.
workdir_of() {
  local word workdir="" config=""
  for word in "$@"; do
    case $word in
      --workdir=?*) workdir=${word#*=} ;;
      --config=?*) config=${word#*=} ;;
    esac
  done
  [[ $config ]] || fail "the arguments of sddit_jax.main lack --config=FILE"
  [[ $workdir ]] || fail "the arguments of sddit_jax.main lack --workdir=FOLDER"
  [[ $workdir != *://* ]] || fail "--workdir=$workdir: it should be a folder that all hosts see; mount the bucket"
  echo "${workdir/#\~\//$HOME/}"
}

# Prints the newest step that has a checkpoint in a run's folder; -1 if there is none.
newest_step() {
  local path step newest=-1
  for path in "$1"/checkpoints/*/; do
    step=$(basename "$path")
    if [[ $step =~ ^[0-9]+$ ]] && ((10#$step > newest)); then
      newest=$((10#$step))
    fi
  done
  echo "$newest"
}

# After a run that ended without a final exit code: gave_up WORKDIR RETRIES sets `step`, the newest checkpoint's, `best`,
# the highest so far, and `failures`, how many runs in a row have not raised it. True for more than RETRIES.
gave_up() {
  step=$(newest_step "$1")
  if ((step > best)); then
    best=$step failures=0
  else
    failures=$((failures + 1))
  fi
  ((failures > $2)) || return 1
  echo "error: exit code $code; $failures runs in a row ended without a new checkpoint in $1" >&2
}

# Whether an exit code of sddit_jax.main is final: 0 done, 2 the user's mistake, 3 diverged.
is_final() {
  [[ $1 == 0 || $1 == 2 || $1 == 3 ]]
}

# Waits until a child ends, and sets `code`. `wait` ends early for a trapped signal, whose trap sets `signalled`.
wait_for() {
  while true; do
    signalled="" code=0
    wait "$1" || code=$?
    [[ $signalled && $code -gt 128 ]] || return 0
  done
}
