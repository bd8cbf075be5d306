#!/usr/bin/env bash
# Runs a command again until it is done: launch/restart.sh [--retries=5] [--delay=10] [--run=FOLDER] COMMAND...
#
# Exit codes 0, 2 and 3 of the command end this script with the same code. After any other exit code the command starts
# again. If more than --retries runs in a row end without a new checkpoint in the command's --workdir, this script ends
# with exit code 1. --delay is the first pause in seconds; it doubles with each run without a new checkpoint, up to ten
# minutes. SIGTERM goes to the command, which saves and ends; then this script ends with exit code 75.
#
# FOLDER gets three files: `pid`; `lock`, which is locked as long as this script or the command lives; and at the end
# `exit_code`.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

retries=5 delay=10 folder=""
while [[ ${1:-} == --* ]]; do
  case $1 in
    --retries=*) retries=${1#*=} ;;
    --delay=*) delay=${1#*=} ;;
    --run=*) folder=${1#*=} ;;
    *) fail "unknown argument $1; launch/restart.sh takes --retries, --delay and --run before the command" ;;
  esac
  shift
done
[[ $retries =~ ^[0-9]+$ ]] || fail "--retries=$retries is not a number"
[[ $delay =~ ^[0-9]+$ ]] || fail "--delay=$delay is not a number of seconds"
(($#)) || fail "launch/restart.sh needs a command"
workdir=$(workdir_of "$@")

if [[ $folder ]]; then
  mkdir -p "$folder"
  exec 9>>"$folder/lock"
  flock --nonblock 9 || fail "$folder/lock is locked: the run is running already"
  rm -f "$folder/exit_code"
  echo $$ >"$folder/pid"
fi

finish() {
  if [[ $folder ]]; then
    echo "$1" >"$folder/exit_code"
  fi
  exit "$1"
}

catches_sigterm() {
  local key value
  while read -r key value; do
    if [[ $key == SigCgt: ]]; then
      ((0x$value >> 14 & 1)) && return 0
    fi
  done <"/proc/$1/status"
  return 1
} 2>/dev/null

# A host that shuts down sends SIGTERM to every process, so this script and the command both get it. A second SIGTERM
# would kill the command while it saves. Therefore this sends SIGTERM only while the command has a handler for it: the
# command has none before its first step, and none after it got a SIGTERM.
stop() {
  signalled=yes stopping=yes
  while [[ $child ]] && kill -0 "$child" 2>/dev/null; do
    if catches_sigterm "$child"; then
      kill -TERM "$child" 2>/dev/null || true
      break
    fi
    sleep 0.2 9>&-
  done
}

child="" stopping="" signalled="" code=0
trap stop TERM INT
best=$(newest_step "$workdir")
failures=0
while [[ ! $stopping ]]; do
  "$@" &
  child=$!
  if [[ $stopping ]]; then
    stop
  fi
  wait_for "$child"
  child=""
  if is_final "$code"; then
    finish "$code"
  fi
  if [[ $stopping ]]; then
    break
  fi
  if gave_up "$workdir" "$retries"; then
    finish 1
  fi
  pause=$((delay << (failures > 1 ? (failures < 12 ? failures - 1 : 11) : 0)))
  ((pause <= 600)) || pause=600
  echo "exit code $code, newest checkpoint $step: starting again in $pause s ($failures of $retries)" >&2
  sleep "$pause" 9>&- &
  nap=$!
  wait "$nap" || true
  kill "$nap" 2>/dev/null || true
done
echo "stopped with exit code $code, newest checkpoint $(newest_step "$workdir")" >&2
finish 75
