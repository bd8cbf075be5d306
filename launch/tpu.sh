#!/usr/bin/env bash
# Trains on Cloud TPU VMs, one or a pod slice: launch/tpu.sh COMMAND NAME [FLAGS] [-- ARGUMENTS OF sddit_jax.main]
#
#   create    requests the TPU                         start    starts the run on all workers, in the background
#   install   copies the code, makes an environment    stop     sends SIGTERM to all workers; waits until the run saved
#   log       follows the log of a worker              status   prints the state of the TPU and of each worker's run
#   delete    deletes the TPU                          watch    does all of this until the run is done, and starts the
#                                                               run again after preemptions and crashes
#
#   --type=TYPE           accelerator type, such as v5litepod-16 or v6e-8; for create and watch
#   --version=VERSION     runtime version; default: the one for the type
#   --zone=ZONE           zone, --project=PROJECT project; default: those of gcloud's configuration
#   --spot                use spot capacity, which can be preempted
#   --queued              request a queued resource, which waits until there is capacity
#   --create_flag=FLAG    further flag of gcloud's create, such as --create_flag=--network=NETWORK; repeatable
#   --ssh_flag=FLAG       further flag of gcloud's ssh and scp, such as --ssh_flag=--internal-ip; repeatable
#   --repository=URL      clone this repository instead of copying this folder; --revision=REVISION checks it out
#   --setup=COMMAND       runs on each worker before each start, such as a mount; has to succeed a second time too
#   --env=NAME=VALUE      environment variable of the run; repeatable
#   --retries=5           give up when more runs in a row end without a new checkpoint
#   --worker=0            number of the worker whose log to follow
#   --poll=60             seconds between two looks at the TPU; for watch
#   --dry_run             print the commands and run none; DRY_RUN=1 does the same
#
# Exit codes: 0, 2 and 3 as sddit_jax.main; 1 if the run or a command of gcloud failed.
#
# gcloud has no command that keeps a run alive without a connection, or that creates a preempted TPU again.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$root/launch/common.sh"

command=${1:-} name=${2:-}
case $command in
  create | install | start | log | status | stop | watch | delete) ;;
  *) fail "unknown command '$command'; it is create, install, start, log, status, stop, watch or delete" ;;
esac
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "'$name' is no name of a TPU: lower case letters, digits and hyphens"
shift 2

type="" version="" spot="" queued="" repository="" revision="" setup=":" retries=5 worker=0 poll=60
# The resource that `create` and `delete` name: a node, or the queued resource that makes a node.
resource=tpu-vm
place=() create_flags=() ssh_flags=() environment=()
dry_run=${DRY_RUN:-0}
while (($#)); do
  case $1 in
    --type=?*) type=${1#*=} ;;
    --version=?*) version=${1#*=} ;;
    --zone=?* | --project=?*) place+=("$1") ;;
    --spot) spot=yes ;;
    --queued) queued=yes resource=queued-resources ;;
    --create_flag=--*) create_flags+=("${1#*=}") ;;
    --ssh_flag=--*) ssh_flags+=("${1#*=}") ;;
    --repository=?*) repository=${1#*=} ;;
    --revision=?*) revision=${1#*=} ;;
    --setup=?*) setup=${1#*=} ;;
    --env=[A-Za-z_]*=*) environment+=("${1#*=}") ;;
    --retries=?*) retries=${1#*=} ;;
    --worker=?*) worker=${1#*=} ;;
    --poll=?*) poll=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --) shift && break ;;
    *) fail "unknown argument $1; the head of launch/tpu.sh lists the flags, and -- comes before those of the run" ;;
  esac
  shift
done
for number in retries worker poll; do
  [[ ${!number} =~ ^[0-9]+$ ]] || fail "--$number=${!number} is not a number"
done
[[ ! $revision || $repository ]] || fail "--revision=$revision needs --repository=URL"
if [[ $command == create || $command == watch ]]; then
  [[ $type ]] || fail "$command needs --type=TYPE, such as --type=v5litepod-16"
  if [[ ! $version ]]; then
    case $type in
      v2-* | v3-* | v4-*) version="tpu-ubuntu2204-base" ;;
      v5litepod-*) version=v2-alpha-tpuv5-lite ;;
      v5p-*) version=v2-alpha-tpuv5 ;;
      v6e-*) version=v2-alpha-tpuv6e ;;
      *) fail "--type=$type: its runtime version is not known here (v2 to v4, v5litepod, v5p, v6e are); give --version" ;;
    esac
  fi
fi
if [[ $command == start || $command == watch ]]; then
  workdir_of "$@" >/dev/null
fi

# Runs a command of gcloud for this TPU: tpu tpu-vm|queued-resources VERB [FLAGS].
tpu() {
  run gcloud compute tpus "$1" "$2" "$name" ${place[@]+"${place[@]}"} "${@:3}"
}

# on_workers WORKER COMMAND runs a shell command in the home folder of a worker, or of all.
on_workers() {
  tpu tpu-vm ssh --worker="$1" --command="$2" ${ssh_flags[@]+"${ssh_flags[@]}"}
}

# On a worker ~/sddit_jax has the code, ~/sddit_jax_venv the Python environment, and ~/sddit_jax_run the log, the lock
# and the exit code of the run.
# shellcheck disable=SC2016  # Expanded on the worker.
say='echo "sddit_jax $(hostname)":'
not_running='{ [ ! -e sddit_jax_run/lock ] || flock --nonblock sddit_jax_run/lock true; }'
# Prints a line for each worker: missing (not installed), idle, running, lost (ended without exit code) or exit CODE.
# shellcheck disable=SC2016
report='s=idle; if ! [ -x sddit_jax/launch/restart.sh ]; then s=missing; '"elif ! $not_running; then s=running; "\
'elif [ -s sddit_jax_run/exit_code ]; then s="exit $(cat sddit_jax_run/exit_code)"; '\
'elif [ -e sddit_jax_run/lock ]; then s=lost; fi; '"$say "'"$s"'

create() {
  local what=(--accelerator-type="$type" --version="$version")
  if [[ $queued ]]; then
    what=(--node-id="$name" --accelerator-type="$type" --runtime-version="$version")
  fi
  run gcloud compute tpus "$resource" create "$name" "${what[@]}" ${place[@]+"${place[@]}"} ${spot:+--spot} \
    ${create_flags[@]+"${create_flags[@]}"}
}

delete() {
  # With --force gcloud also deletes the node of a queued resource.
  tpu "$resource" delete ${queued:+--force} --quiet
}

install() {
  local cache=${XDG_CACHE_HOME:-$HOME/.cache}/sddit_jax get python
  get="$not_running || { $say runs already; exit 2; }; rm -rf sddit_jax && "
  if [[ $repository ]]; then
    get+="git clone --quiet -- $(quote "$repository") sddit_jax"
    if [[ $revision ]]; then
      get+=" && git -C sddit_jax checkout --quiet $(quote "$revision")"
    fi
  else
    run mkdir -p "$cache" || return
    run tar -czf "$cache/$name.tar.gz" -C "$root" --exclude=__pycache__ \
      LICENSE README.md configs launch pyproject.toml sddit_jax setup.cfg || return
    run gcloud compute tpus tpu-vm scp "$cache/$name.tar.gz" "$name:sddit_jax.tar.gz" ${place[@]+"${place[@]}"} --worker=all \
      ${ssh_flags[@]+"${ssh_flags[@]}"} || return
    get+="mkdir sddit_jax && tar -xzf sddit_jax.tar.gz -C sddit_jax"
  fi
  # The images of TPU VMs have Python 3.10; uv installs 3.12. The variable lets pip install uv for the user where the
  # distribution manages Python.
  python="PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user --upgrade uv"
  python+=" && python3 -m uv venv --quiet --allow-existing --python=3.12 sddit_jax_venv"
  python+=" && python3 -m uv pip install --quiet --python=sddit_jax_venv/bin/python \"./sddit_jax[tpu]\""
  on_workers all "$get && $python"
}

# start [CODE] starts the run. A worker where it is running already ends with CODE, by default 2.
start() {
  local busy=${1:-2} run_it
  run_it=$(quote env ${environment[@]+"${environment[@]}"} setsid nohup launch/restart.sh --run=../sddit_jax_run \
    --retries="$retries" ../sddit_jax_venv/bin/python -m sddit_jax.main --distributed=auto "${arguments[@]}")
  on_workers all "$not_running || { $say runs already; exit $busy; }; \
[ -x sddit_jax/launch/restart.sh ] || { $say not installed; exit 2; }; \
bash -c $(quote "$setup") && mkdir -p sddit_jax_run && rm -f sddit_jax_run/exit_code && cd sddit_jax && \
{ $run_it >>../sddit_jax_run/log 2>&1 </dev/null & }"
}

stop() {
  # shellcheck disable=SC2016
  on_workers all "$not_running || { "'kill -TERM "$(cat sddit_jax_run/pid)"; flock sddit_jax_run/lock true; }; '"$report"
}

log() {
  on_workers "$worker" "tail -n 100 -F sddit_jax_run/log"
}

# Prints the state of a tpu-vm or of queued-resources.
describe() {
  local field=state
  if [[ $1 == queued-resources ]]; then
    field=state.state
  fi
  tpu "$1" describe "--format=value($field)"
}

status() {
  local kind
  for kind in ${queued:+queued-resources} tpu-vm; do
    describe "$kind"
  done
  on_workers all "$report"
}

# Prints what `watch` has to do with the TPU: create, recreate, use or wait.
tpu_needs() {
  local kind state
  for kind in ${queued:+queued-resources} tpu-vm; do
    if ! state=$(describe "$kind" 2>&1); then
      if [[ $state == *NOT_FOUND* ]]; then
        # A queued resource that becomes active may not have its node yet.
        if [[ $kind == tpu-vm && $queued ]]; then echo wait; else echo create; fi
      else
        echo "$state" >&2
        echo wait
      fi
      return
    fi
    # gcloud may print other lines too.
    if grep --quiet --line-regexp --extended-regexp "PREEMPTED|TERMINATED|SUSPENDED|FAILED" <<<"$state"; then
      echo recreate
      return
    elif ! grep --quiet --line-regexp --extended-regexp "READY|ACTIVE" <<<"$state"; then
      echo wait
      return
    fi
  done
  echo use
}

# Requests the TPU every `poll` seconds until there is capacity. Any other failure ends the script.
create_when_possible() {
  local message
  until message=$(create 2>&1); do
    echo "$message" >&2
    if ! grep --quiet --ignore-case --extended-regexp "no more capacity|insufficient capacity|RESOURCE_EXHAUSTED" \
      <<<"$message"; then
      exit 1
    fi
    sleep "$poll"
  done
}

# Looks at the run: ends this script if the run has a final exit code, and starts the run where it is not running.
tend() {
  local answer states
  if ! answer=$(on_workers all "$report"); then
    echo "$answer" >&2
    return
  fi
  states=$(sed -n 's/^sddit_jax [^:]*: //p' <<<"$answer")
  if grep --quiet missing <<<"$states"; then
    attempt install
    attempt start_again
  elif [[ $seen ]] && grep --quiet --extended-regexp '^exit [123]$' <<<"$states"; then
    echo "$answer"
    on_workers all "$not_running || kill -TERM \$(cat sddit_jax_run/pid)" || true
    exit "$(sed -n 's/^exit \([123]\)$/\1/p' <<<"$states" | sort --reverse | head -n 1)"
  elif [[ $seen ]] && ! grep --quiet --invert-match --line-regexp 'exit 0' <<<"$states"; then
    echo "$answer"
    echo "done; the TPU is still there: launch/tpu.sh delete $name"
    exit 0
  elif grep --quiet running <<<"$states"; then
    seen=yes failed=0
    if grep --quiet --invert-match --extended-regexp '^(running|exit 0)$' <<<"$states"; then
      attempt start_again
    fi
  else
    attempt start_again
  fi
}

start_again() {
  start 0 && seen=yes
}

# Cloud TPU does not restart a preempted TPU, so it is deleted and requested again.
recreate() {
  seen=""
  delete && create_when_possible
}

# Runs a function that should lead to a running run. A round has at most three; `retries` rounds may fail in a row.
attempt() {
  echo "$name: ${1//_/ }" >&2
  failed=$((failed + 1))
  if ((failed > 3 * (retries + 1))); then
    echo "error: $name: $1 is needed again, and the run was not seen running since $((failed - 1)) such steps" >&2
    exit 1
  fi
  "$@" || true
}

# `seen`: whether the exit codes on the workers are of this run, which the script started or found running.
watch() {
  local seen="" failed=0
  if [[ $dry_run == 1 ]]; then
    describe "$resource"
    create
    describe tpu-vm
    install
    start 0
    on_workers all "$report"
    return
  fi
  while true; do
    case $(tpu_needs) in
      create) create_when_possible ;;
      recreate) attempt recreate ;;
      use) tend ;;
    esac
    sleep "$poll"
  done
}

arguments=("$@")
"$command"
