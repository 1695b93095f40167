#!/usr/bin/env bash
# Runs `python -m vaediff.main` and runs it again after preemption. The other launchers call this one.
#
#   launch/run.sh [--dry-run] [--retries N] [--through WORD...] -- --config=configs/digits.py [--config.x.y=...]
#
# --dry-run          (or DRY_RUN=1) prints the command line on stdout and does nothing.
# --retries N        runs again at most N times (10), after a pause that doubles from RETRY_PAUSE (5) to 300 s.
#                    0 replaces this process by the command: a supervisor decides what its status means.
# --through WORD...  puts these words before `python`; for launchers that start it elsewhere or several times.
# PYTHON             the interpreter (python).
#
# Not run again: status 0; 2 (the user has something to mend); 130 (interrupted); 126 and 127 (nothing could be
# started); and any status once this script got SIGTERM, SIGINT or SIGHUP. Those reach the command as SIGTERM, upon which it saves
# a checkpoint. The exit status is that of the last run.
#
# Keeps to bash 3.2, which macOS has.
set -euo pipefail

usage() {
  echo "usage: launch/run.sh [--dry-run] [--retries N] [--through WORD...] -- ARGUMENTS OF vaediff.main" >&2
  exit 2
}

# One line that a shell reads back as these words; quoted only where needed, so that it stays legible.
line() {
  local word text='' quote="'" escaped="'\\''"
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_@%+=:,./-]*) word=$quote${word//$quote/$escaped}$quote ;;
    esac
    text+="${text:+ }$word"
  done
  printf '%s\n' "$text"
}

dry_run=${DRY_RUN:-0} retries=10 through=()
while (($#)); do
  case $1 in
    --dry-run) dry_run=1 ;;
    --retries)
      [[ ${2-} =~ ^[0-9]+$ ]] || usage
      retries=$2
      shift
      ;;
    --through)
      shift
      while [[ $# -gt 0 && $1 != -- ]]; do
        through+=("$1")
        shift
      done
      (($#)) || usage
      shift
      break
      ;;
    --)
      shift
      break
      ;;
    *) usage ;;
  esac
  shift
done
(($#)) || usage

python=("${PYTHON:-python}" -m vaediff.main "$@")
if [[ $dry_run != 0 ]]; then
  line "${python[@]}"
  exit 0
fi
echo "+ $(line "${python[@]}")" >&2
command=(${through[@]+"${through[@]}"} "${python[@]}") # an empty array is an error in bash before 4.4
((retries)) || exec "${command[@]}"

signals=0 child='' told=''
forward() {
  signals=$((signals + 1))
  if [[ -n $child ]]; then
    told=$child
    kill -TERM "$child" 2>/dev/null || true
  fi
}
trap forward TERM INT HUP

# Runs a command and sets `status`. In the background, because bash handles no signal while it waits for a
# command in the foreground.
run() {
  local before code first=1
  status=0
  "$@" &
  child=$!
  if ((signals)) && [[ $told != "$child" ]]; then forward; fi # it came before `child` was known
  while :; do
    before=$signals code=0
    wait "$child" || code=$?
    if ((first || code != 127)); then status=$code; fi # 127: bash has forgotten it, so the first answer was it
    first=0
    if [[ $signals == "$before" ]]; then break; fi # otherwise a signal ended `wait`, and not the command
  done
  child=''
}

pause=${RETRY_PAUSE:-5}
for ((round = 1; ; round++)); do
  run "${command[@]}"
  result=$status
  case $result in
    0) exit 0 ;;
    2 | 126 | 127) meaning='nothing that another run could mend' ;;
    130) meaning='interrupted' ;;
    75) meaning='preempted; a checkpoint is saved' ;;
    76) meaning='another process was lost' ;;
    *) meaning='it failed' ;;
  esac
  echo "launch/run.sh: exit status $result ($meaning)" >&2
  case $result in 2 | 126 | 127 | 130) exit "$result" ;; esac
  if ((signals)); then exit "$result"; fi
  if ((round > retries)); then
    echo "launch/run.sh: giving up after $round runs; the same command goes on where they stopped" >&2
    exit "$result"
  fi
  echo "launch/run.sh: run $((round + 1)) of at most $((retries + 1)) in $pause s" >&2
  for ((slept = 0; slept < pause && !signals; slept++)); do run sleep 1; done
  if ((signals)); then exit "$result"; fi
  pause=$((pause * 2 < 300 ? pause * 2 : 300))
done
