#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster, a JobSet: launch/gke.sh COMMAND NAME [FLAGS] [-- ARGUMENTS OF sddit_jax.main]
#
#   apply     creates the JobSet                       status   prints the state of the JobSet and of its pods
#   render    prints its manifest                      log      follows the log of the first host
#   delete    deletes it: the run gets SIGTERM and saves
#
#   --type=TYPE            generation of the TPU: v4, v5e, v5p or v6e
#   --topology=AxB         chips of the slice on each side; AxBxC for v4 and v5p
#   --image=IMAGE          container image, made with launch/Dockerfile.tpu
#   --chips_per_host=N     chips of a host; default 4, or all of a v5e or v6e slice of up to 8 chips
#   --claim=NAME:FOLDER    mounts a PersistentVolumeClaim at FOLDER; repeatable
#   --bucket=NAME:FOLDER   mounts a Cloud Storage bucket at FOLDER by the Cloud Storage FUSE CSI driver; repeatable
#   --service_account=NAME Kubernetes service account
#   --namespace=NAME       Kubernetes namespace; default: that of kubectl's context
#   --spot                 run on spot nodes
#   --max_restarts=100     preemptions and crashes after which the JobSet fails
#   --grace=300            seconds between SIGTERM and SIGKILL, in which the run can save
#   --env=NAME=VALUE       environment variable of the run; repeatable
#   --dry_run              print the commands and run none; DRY_RUN=1 does the same
#
# The cluster is that of kubectl's current context. It needs JobSet 0.6 or later.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$root/launch/common.sh"

command=${1:-} name=${2:-}
case $command in
  apply | render | delete | status | log) ;;
  *) fail "unknown command '$command'; it is apply, render, delete, status or log" ;;
esac
# A pod's name is this name and a suffix, of at most 63 characters together.
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail "'$name' is no name of a JobSet: up to 40 lower case letters, digits and hyphens"
shift 2

type="" topology="" image="" chips_per_host="" service_account="" spot="" max_restarts=100 grace=300
namespace=() claims=() buckets=() environment=()
dry_run=${DRY_RUN:-0}
while (($#)); do
  case $1 in
    --type=?*) type=${1#*=} ;;
    --topology=?*) topology=${1#*=} ;;
    --image=?*) image=${1#*=} ;;
    --chips_per_host=?*) chips_per_host=${1#*=} ;;
    --claim=?*:/*) claims+=("${1#*=}") ;;
    --bucket=?*:/*) buckets+=("${1#*=}") ;;
    --service_account=?*) service_account=${1#*=} ;;
    --namespace=?*) namespace=("$1") ;;
    --spot) spot=yes ;;
    --max_restarts=?*) max_restarts=${1#*=} ;;
    --grace=?*) grace=${1#*=} ;;
    --env=[A-Za-z_]*=*) environment+=("${1#*=}") ;;
    --dry_run) dry_run=1 ;;
    --) shift && break ;;
    *) fail "unknown argument $1; the head of launch/gke.sh lists the flags, and -- comes before those of the run" ;;
  esac
  shift
done

# Prints a text as a YAML string. Kubernetes would replace $(NAME), but prints $$(NAME) as $(NAME).
string() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\t'/\\t}
  printf '"%s"' "${text//\$(/\$\$(}"
}

check() {
  local number dimensions=2
  for number in chips_per_host max_restarts grace; do
    [[ ${!number:-1} =~ ^[1-9][0-9]*$ ]] || fail "--$number=${!number} is not a number of 1 or more"
  done
  case $type in
    v4) accelerator=tpu-v4-podslice dimensions=3 ;;
    v5e) accelerator=tpu-v5-lite-podslice ;;
    v5p) accelerator=tpu-v5p-slice dimensions=3 ;;
    v6e) accelerator=tpu-v6e-slice ;;
    *) fail "--type=$type: it should be v4, v5e, v5p or v6e" ;;
  esac
  [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){$((dimensions - 1))}$ ]] ||
    fail "--topology=$topology: $type has $dimensions dimensions, as in $([[ $dimensions == 2 ]] && echo 4x4 || echo 2x2x4)"
  [[ $image ]] || fail "$command needs --image=IMAGE, built with launch/Dockerfile.tpu"
  chips=$((${topology//x/*}))
  if [[ ! $chips_per_host ]]; then
    chips_per_host=4
    if ((chips < 4 || (dimensions == 2 && chips == 8))); then
      chips_per_host=$chips
    fi
  fi
  ((chips % chips_per_host == 0)) || fail "--topology=$topology has $chips chips, no multiple of $chips_per_host a host"
}

manifest() {
  local word i annotations="" mounts="" volumes=""
  for i in ${claims[@]+"${!claims[@]}"}; do
    mounts+="
                    - {name: claim-$i, mountPath: $(string "${claims[i]#*:}")}"
    volumes+="
                - name: claim-$i
                  persistentVolumeClaim: {claimName: $(string "${claims[i]%%:*}")}"
  done
  for i in ${buckets[@]+"${!buckets[@]}"}; do
    annotations="
              annotations: {gke-gcsfuse/volumes: \"true\"}"
    mounts+="
                    - {name: bucket-$i, mountPath: $(string "${buckets[i]#*:}")}"
    volumes+="
                - name: bucket-$i
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes: {bucketName: $(string "${buckets[i]%%:*}"), mountOptions: implicit-dirs}"
  done
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    # Kubernetes places all hosts on one slice.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  # The hosts find each other by a headless service.
  network: {enableDNSHostnames: true}
  failurePolicy:
    maxRestarts: $max_restarts
    rules:
      # Exit codes 2 and 3 are final, by the podFailurePolicy below. Any other failure starts all hosts again.
      - {name: final, action: FailJobSet, onJobFailureReasons: [PodFailurePolicy]}
  replicatedJobs:
    - name: slice
      replicas: 1
      template:
        spec:
          parallelism: $((chips / chips_per_host))
          completions: $((chips / chips_per_host))
          completionMode: Indexed
          # When one host fails, all end, and all start again together.
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: train, operator: In, values: [2, 3]}
          template:
            metadata:
              labels: {app: sddit-jax}$annotations
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: $grace
YAML
  if [[ $service_account ]]; then
    echo "              serviceAccountName: $(string "$service_account")"
  fi
  cat <<YAML
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $topology
YAML
  if [[ $spot ]]; then
    cat <<YAML
                cloud.google.com/gke-spot: "true"
              tolerations:
                - {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}
YAML
  fi
  cat <<YAML
              containers:
                - name: train
                  image: $(string "$image")
                  command: [python, -m, sddit_jax.main]
                  args:
                    - --distributed=auto
YAML
  for word in "${arguments[@]}"; do
    echo "                    - $(string "$word")"
  done
  if ((${#environment[@]})); then
    echo "                  env:"
    for word in "${environment[@]}"; do
      echo "                    - {name: $(string "${word%%=*}"), value: $(string "${word#*=}")}"
    done
  fi
  echo "                  resources: {limits: {google.com/tpu: $chips_per_host}}"
  if [[ $mounts ]]; then
    echo "                  volumeMounts:$mounts"
    echo "              volumes:$volumes"
  fi
}

arguments=("$@")
selector=jobset.sigs.k8s.io/jobset-name=$name
case $command in
  apply | render)
    workdir_of "$@" >/dev/null
    check
    yaml=$(manifest)
    if [[ $command == render ]]; then
      echo "$yaml"
    elif [[ $dry_run == 1 ]]; then
      echo "$(quote kubectl apply ${namespace[@]+"${namespace[@]}"} --filename=-) <<'YAML'"
      echo "$yaml"
      echo YAML
    else
      kubectl apply ${namespace[@]+"${namespace[@]}"} --filename=- <<<"$yaml"
    fi
    ;;
  delete) run kubectl delete jobset "$name" ${namespace[@]+"${namespace[@]}"} ;;
  status)
    run kubectl get jobset "$name" ${namespace[@]+"${namespace[@]}"}
    run kubectl get pods --selector="$selector" --output=wide ${namespace[@]+"${namespace[@]}"}
    ;;
  log)
    run kubectl logs --follow --tail=100 --container=train \
      --selector="$selector,batch.kubernetes.io/job-completion-index=0" ${namespace[@]+"${namespace[@]}"}
    ;;
esac
