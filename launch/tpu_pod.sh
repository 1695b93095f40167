#!/usr/bin/env bash
# A TPU VM slice of one or many hosts, from a computer with gcloud. Every command is echoed before it runs.
#
#   launch/tpu_pod.sh create name=mine zone=us-east5-b type=v5p-32 version=v2-alpha-tpuv5 [spot=true]
#   launch/tpu_pod.sh setup  name=mine zone=us-east5-b
#   launch/tpu_pod.sh run    name=mine zone=us-east5-b -- --config=configs/celeba256.py --workdir=/mnt/runs/celeba256
#   launch/tpu_pod.sh stop   name=mine zone=us-east5-b
#   launch/tpu_pod.sh delete name=mine zone=us-east5-b
#
# create   asks for the slice; it is there once `gcloud compute tpus queued-resources list` calls it ACTIVE
# setup    copies the last commit to all hosts and installs it there; again after every new commit
# run      starts the program on all hosts; when one of them fails, on all of them again
#          Ctrl-C makes it save a checkpoint and end
# stop     does the same from elsewhere, once `run` itself is gone (otherwise it would start the program again)
# delete   gives the slice back, also one that was preempted
#
# --dry-run (or DRY_RUN=1) prints the commands only; --retries N for `run` (100) as in launch/run.sh.
# project=ID: gcloud's default otherwise. python=python3.12: what setup makes the environment with (python3.11).
#
# All hosts must see the workdir, and it must outlive them: a mounted bucket or Filestore, not a local disk.
# A spot slice that was preempted is gone: delete, create, setup, and run again with the same workdir.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
  echo "tpu_pod.sh: $*" >&2
  exit 2
}

# On a host: ends the run before, if it is still there (its connection may have broken), and waits for it.
# The file holds the id of the python process, because run.sh with --retries 0 becomes that process.
end_run=$(
  cat <<'END'
id=$(cat ~/vaediff.pid 2>/dev/null || true)
if [ -n "$id" ] && grep -qas vaediff.main "/proc/$id/cmdline"; then
  kill -TERM "$id"
  for _ in $(seq 180); do kill -0 "$id" 2>/dev/null || break; sleep 1; done
fi
END
)
start_run=$(
  cat <<'END'
cd ~/vaediff && echo $$ >~/vaediff.pid && PYTHON=../vaediff-env/bin/python exec bash launch/run.sh --retries 0 --
END
)

# One line that a shell reads back as these words.
words_for_a_shell() {
  local text
  text=$(PYTHON=python "$here/run.sh" --dry-run -- "$@")
  echo "${text#python -m vaediff.main }"
}

# Echoes and runs a gcloud command for the slice.
tpus() {
  set -- gcloud compute tpus "$@" "--zone=$zone" ${project:+"--project=$project"}
  if [[ $dry_run != 0 ]]; then
    words_for_a_shell "$@"
  else
    echo "+ $(words_for_a_shell "$@")" >&2
    "$@"
  fi
}

everywhere() {
  tpus tpu-vm ssh "$name" --worker=all "--command=$1"
}

# One round of `run`, called back by run.sh with the python line, of which the arguments matter.
start_everywhere() {
  local signals=0 before status connection
  # The signal ends the connections at most, so the hosts must hear of it in another way.
  trap 'signals=$((signals + 1)); everywhere "$end_run" || true' TERM
  everywhere "$end_run
$start_run $(words_for_a_shell "${@:4}")" &
  connection=$!
  while :; do
    before=$signals status=0
    wait "$connection" || status=$?
    if [[ $signals == "$before" ]]; then break; fi
  done
  exit "$status" # gcloud's is that of the first host that failed; a lost connection is 255
}

dry_run=${DRY_RUN:-0} options=(--retries 100)
verb='' name='' zone='' project='' type='' version='' spot=false python=python3.11
while (($#)); do
  case $1 in
    --dry-run) dry_run=1 ;;
    --retries)
      options+=("$1" "${2-}")
      shift
      ;;
    create | setup | run | stop | delete | --start-everywhere) verb=$1 ;;
    name=* | zone=* | project=* | type=* | version=* | spot=* | python=*)
      [[ ${1#*=} =~ ^[A-Za-z0-9._:-]+$ ]] || fail "$1: only letters, digits and . _ : - are allowed"
      declare "$1"
      ;;
    --)
      shift
      break
      ;;
    *)
      if [[ $verb == --start-everywhere ]]; then break; fi
      fail "$1 is unknown; the arguments of vaediff.main come after --"
      ;;
  esac
  shift
done
[[ -n $verb ]] || fail 'say what to do: create, setup, run, stop or delete'
[[ -n $name && -n $zone ]] || fail 'name=... and zone=... are needed'

case $verb in
  create)
    [[ -n $type && -n $version ]] || fail 'create needs type=... and version=...'
    if [[ $spot == true ]]; then kind=(--spot); else kind=(); fi
    tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" \
      "--runtime-version=$version" ${kind[@]+"${kind[@]}"}
    ;;
  setup)
    archive=vaediff.tar.gz
    if [[ $dry_run == 0 ]]; then
      folder=$(mktemp -d)
      trap 'rm -rf "$folder"' EXIT
      archive=$folder/$archive
      git -C "$here/.." archive --format=tar.gz --output="$archive" HEAD
    fi
    tpus tpu-vm scp "$archive" "$name:vaediff.tar.gz" --worker=all
    # A fresh folder, so that files which a commit removed do not stay.
    everywhere "set -e
command -v $python >/dev/null || { sudo apt-get update && sudo apt-get install -y $python-venv; }
rm -rf vaediff && mkdir vaediff && tar -xzf vaediff.tar.gz -C vaediff
[ -d vaediff-env ] || $python -m venv vaediff-env
vaediff-env/bin/pip install --quiet -e 'vaediff[tpu]'"
    ;;
  run)
    (($#)) || fail 'run needs the arguments of vaediff.main after --'
    if [[ $dry_run != 0 ]]; then
      PYTHON=python "$here/run.sh" --dry-run -- --distributed=on "$@"
      start_everywhere python -m vaediff.main --distributed=on "$@"
    fi
    # PYTHON is for the hosts, where it is fixed; here nothing of it runs.
    PYTHON=python exec "$here/run.sh" "${options[@]}" --through "$here/tpu_pod.sh" --start-everywhere \
      "name=$name" "zone=$zone" ${project:+"project=$project"} -- --distributed=on "$@"
    ;;
  --start-everywhere) start_everywhere "$@" ;;
  stop) everywhere "$end_run" ;;
  delete) tpus queued-resources delete "$name" --force --quiet ;;
esac
