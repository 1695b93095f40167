#!/usr/bin/env bash
# One computer, one CPU or GPU.
#
#   launch/laptop.sh [--dry-run] [--retries N] [--] --config=configs/digits.py [--config.x.y=...]
#
# Options and environment: launch/run.sh. Ctrl-C saves a checkpoint and stops; the same command goes on.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

options=(--retries 3)
while (($#)); do
  case $1 in
    --dry-run) options+=("$1") ;;
    --retries)
      options+=("$1" "${2-}")
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

# Off, so that variables left over from a cluster do not make it wait for others.
exec "$here/run.sh" "${options[@]}" -- --distributed=off "$@"
