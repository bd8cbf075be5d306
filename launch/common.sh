# Functions that the scripts of this folder share. Source this file; do not run it.
# shellcheck shell=bash

# Ends the script with one line and exit code 2, for a mistake of the user.
fail() {
  echo "error: $*" >&2
  exit 2
}

# Prints the arguments on one line, quoted so that a shell reads the same arguments.
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

# Runs a command; with dry_run=1 only prints it.
run() {
  if [[ ${dry_run:-0} == 1 ]]; then
    quote "$@"
    echo
  else
    "$@"
  fi
}

# Prints FOLDER of --workdir=FOLDER among the arguments of sddit_jax.main. Fails if they lack a config or a workdir.
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

# Prints the newest step that has a checkpoint in the workdir $1; -1 if there is none.
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

# gave_up WORKDIR RETRIES, after a run that ended without a final exit code, sets `step` to the newest checkpoint's
# step, `best` to the highest step so far, and `failures` to the number of runs in a row that did not raise `best`. It
# is true for more than RETRIES failures.
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

# Whether the exit code $1 of sddit_jax.main is final: 0 done, 2 the user's mistake, 3 diverged.
is_final() {
  [[ $1 == 0 || $1 == 2 || $1 == 3 ]]
}

# Waits until the child $1 ends, and sets `code`. A trapped signal ends `wait` early; its trap sets `signalled`.
wait_for() {
  while true; do
    signalled="" code=0
    wait "$1" || code=$?
    [[ $signalled && $code -gt 128 ]] || return 0
  done
}
