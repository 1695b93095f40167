#!/usr/bin/env bash
# One box with several GPUs.
#
#   launch/gpu_box.sh [--dry-run] [--retries N] [--processes N] [--] --config=configs/cifar10.py [--config.x.y=...]
#
# Without --processes, one process drives all GPUs: the simplest, and as fast as any unless the host is the limit.
# --processes N starts N of them, which share the GPUs of CUDA_VISIBLE_DEVICES (0..N-1 where it is not set)
# evenly. When one fails, the others get SIGTERM, after GRACE (120) seconds SIGKILL, and all start again together.
# COORDINATOR_PORT chooses the port on which they meet; otherwise a free one is taken.
# Other options and environment: launch/run.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

free_port() {
  local port
  while :; do
    port=$((20000 + RANDOM % 10000))
    # A connection that is refused means that nobody listens there.
    if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
}

# Prints the GPUs of process $1 of $2.
gpus_of() {
  local list share i
  IFS=, read -r -a list <<<"${CUDA_VISIBLE_DEVICES:-$(for ((i = 0; i < $2; i++)); do printf '%s,' "$i"; done)}"
  if ((${#list[@]} % $2)); then
    echo "gpu_box.sh: $2 processes cannot share ${#list[@]} GPUs evenly (CUDA_VISIBLE_DEVICES)" >&2
    exit 2
  fi
  share=$((${#list[@]} / $2))
  (
    IFS=,
    echo "${list[*]:$1 * share:share}"
  )
}

# Runs $2... in $1 processes and ends when all have: with 2 if any says 2, else with the first status not 0.
together() {
  local count=$1 status=0 told=0 deadline='' port id gpus code pid alive=() still
  shift
  tell() {
    told=1
    for pid in "${alive[@]}"; do kill -s "$1" "$pid" 2>/dev/null || true; done
  }
  trap 'tell TERM' TERM
  # A new port each time: the old one may still be held for a minute.
  port=${COORDINATOR_PORT:-$(free_port)}
  for ((id = 0; id < count; id++)); do
    gpus=$(gpus_of "$id" "$count")
    JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count JAX_PROCESS_ID=$id \
      CUDA_VISIBLE_DEVICES=$gpus "$@" &
    alive+=($!)
  done
  while ((${#alive[@]})); do
    sleep 0.2 || true
    still=()
    for pid in "${alive[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        still+=("$pid")
        continue
      fi
      code=0
      wait "$pid" || code=$?
      if ((code == 2 || status == 0)); then status=$code; fi
    done
    alive=("${still[@]}")
    if ((status)) && [[ -z $deadline ]]; then
      deadline=$((SECONDS + ${GRACE:-120}))
      ((told)) || tell TERM
    elif [[ -n $deadline ]] && ((SECONDS >= deadline)); then
      tell KILL
    fi
  done
  exit "$status"
}

if [[ ${1-} == --together ]]; then # how run.sh calls it back, once for every round
  together "${@:2}"
fi

options=() dry_run=${DRY_RUN:-0} processes=1
while (($#)); do
  case $1 in
    --dry-run) dry_run=1 ;;
    --retries)
      options+=("$1" "${2-}")
      shift
      ;;
    --processes)
      processes=${2-}
      shift
      ;;
    --)
      shift
      break
      ;;
    *) break ;;
  esac
  shift
done
if ! [[ $processes =~ ^[1-9][0-9]*$ ]]; then
  echo 'gpu_box.sh: --processes must be a number, at least 1' >&2
  exit 2
fi

if ((processes == 1)); then
  if [[ $dry_run != 0 ]]; then options+=(--dry-run); fi
  exec "$here/run.sh" "${options[@]}" -- --distributed=off "$@"
fi
gpus_of 0 "$processes" >/dev/null
if [[ $dry_run != 0 ]]; then
  command=$("$here/run.sh" --dry-run -- --distributed=on "$@")
  for ((id = 0; id < processes; id++)); do
    echo "JAX_COORDINATOR_ADDRESS=127.0.0.1:${COORDINATOR_PORT:-PORT} JAX_NUM_PROCESSES=$processes" \
      "JAX_PROCESS_ID=$id CUDA_VISIBLE_DEVICES=$(gpus_of "$id" "$processes") $command"
  done
  exit 0
fi
exec "$here/run.sh" "${options[@]}" --through "$here/gpu_box.sh" --together "$processes" -- --distributed=on "$@"
