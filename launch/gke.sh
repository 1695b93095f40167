#!/usr/bin/env bash
# A JobSet on GKE, with TPUs or GPUs: fills in launch/gke_tpu.yaml or launch/gke_gpu.yaml and applies it.
#
#   launch/gke.sh [--dry-run] tpu|gpu KEY=VALUE... -- --config=configs/celeba256.py --workdir=/runs/celeba256 [--config.x.y=...]
#
# The keys are described at the top of the two files; name, image and claim have no default.
# --dry-run (or DRY_RUN=1) prints the manifest on stdout, and the command line of the pods on stderr.
# Restarts are the JobSet's work. `kubectl delete jobset NAME` ends it; applied again with the same workdir, it goes on.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
  echo "gke.sh: $*" >&2
  exit 2
}

# Prints the words as a YAML list of strings in one line.
yaml_list() {
  local word text=''
  for word; do
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    word=${word//$'\n'/\\n}
    word=${word//$'\t'/\\t}
    word=${word//\$/\$\$} # Kubernetes expands $(NAME) in arguments; $$ is its dollar
    text+="${text:+, }\"$word\""
  done
  printf '[%s]\n' "$text"
}

dry_run=${DRY_RUN:-0} kind='' given=()
while (($#)); do
  case $1 in
    --dry-run) dry_run=1 ;;
    tpu | gpu) kind=$1 ;;
    [a-z]*=*) given+=("$1") ;;
    --)
      shift
      break
      ;;
    *) fail "$1 is unknown; the arguments of vaediff.main come after --" ;;
  esac
  shift
done
case $kind in
  tpu) keys=(hosts=4 chips=4 accelerator=tpu-v5-lite-podslice topology=4x4) ;;
  gpu) keys=(hosts=2 gpus=8 accelerator=nvidia-h100-80gb shm=64Gi) ;;
  *) fail 'say tpu or gpu' ;;
esac
keys+=(name= image= claim= restarts=100 account=default)
(($#)) || fail 'the arguments of vaediff.main come after --'

declare -A values
for pair in "${keys[@]}"; do values[${pair%%=*}]=${pair#*=}; done
for pair in ${given[@]+"${given[@]}"}; do
  [[ -v "values[${pair%%=*}]" ]] || fail "${pair%%=*} is not a key of $kind; they are: ${!values[*]}"
  values[${pair%%=*}]=${pair#*=}
done
for key in "${!values[@]}"; do
  case $key in
    hosts | chips | gpus) form='^[1-9][0-9]*$' ;;
    restarts) form='^[0-9]+$' ;;
    name) form='^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$' ;; # host names of the pods are made of it
    *) form='^[A-Za-z0-9][A-Za-z0-9._/:@-]*$' ;;
  esac
  [[ ${values[$key]} =~ $form ]] || fail "$key=${values[$key]} does not match $form"
done

manifest=$(<"$here/gke_$kind.yaml")
for key in "${!values[@]}"; do manifest=${manifest//"\${$key}"/"${values[$key]}"}; done
# Last, because an argument may contain ${name} and the like.
arguments=$(yaml_list "$@")
manifest=${manifest//"\${arguments}"/"$arguments"}

echo "+ $(PYTHON=python "$here/run.sh" --dry-run -- --distributed=on "$@")" >&2
if [[ $dry_run != 0 ]]; then
  printf '%s\n' "$manifest"
else
  printf '%s\n' "$manifest" | kubectl apply -f -
fi
