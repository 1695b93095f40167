#!/usr/bin/env bash
# Nine minutes of an accelerator: what is worth knowing of one, most valuable first, written as it is known.
#
#   benchmarks/accelerator.sh OUT
#
# Run in the repository root, on a machine with Python from 3.11 on and jax for its accelerator. Wheels of missing
# packages in .whl/ are installed into a temporary folder. Nothing is downloaded. OUT gets 8 files at most:
#   machine.txt      the device, versions, and how each part went
#   benchmark.jsonl  train step and sampler in bfloat16 of the refiners of cifar10 and celeba256 and of the latent GAN of
#                    cifar10 (100 images in 4 steps and their decoder are in its `sampling`): seconds, FLOP/s beside the
#                    measured peak of matrix products, memory; the last line: that GAN in int8
#   torch.json       the same networks in PyTorch, where it is installed (benchmarks.paired)
#   costs.txt        operations of the train step of cifar10's U-Net that cost most, of a profile
#   emoji.png .json  samples of emoji64, trained from emoji.npz (in the repository root, or $EMOJI) for EMOJI_SECONDS, and
#                    their figures
#   log.txt          all output
# PARTS: which of these to run, in this order: compile benchmark torch costs int8 emoji flags. `compile` makes the programs
# of the next four first, all side by side, into JAX_COMPILATION_CACHE_DIR (a folder of its own where that is not set):
# compiling takes minutes a network on a GPU (docs/speed.md). COMPILE_SECONDS (240): most that they get.
# SIZE=debug: tiny networks, for a test on a CPU. SECONDS_IN_ALL (530): parts that would begin later are left out.
set -uo pipefail
out=${1:?benchmarks/accelerator.sh OUT: the folder for results}
size=${SIZE:-full}
in_all=${SECONDS_IN_ALL:-530}
emoji=${EMOJI:-emoji.npz}
emoji_seconds=${EMOJI_SECONDS:-180}
parts=${PARTS:-compile benchmark torch costs int8 emoji flags}
python=${PYTHON:-python3}
for one in $parts; do
  [[ " compile benchmark flags torch costs emoji int8 " == *" $one "* ]] || { echo "PARTS names '$one'; see this file" >&2; exit 2; }
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$runs/cache}"
export XLA_PYTHON_CLIENT_PREALLOCATE=false  # PyTorch has a turn on the same device
: > "$out/log.txt"

if compgen -G '.whl/*.whl' > /dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$runs/site" .whl/*.whl \
    >> "$out/log.txt" 2>&1
  export PYTHONPATH="$runs/site:$PYTHONPATH"
fi

say() { echo "$*" | tee -a "$out/machine.txt"; }

part() {  # part NAME LIMIT COMMAND...: runs it, its output into the log; says how it went, and goes on
  local name=$1 limit=$2 began=$SECONDS status=0
  shift 2
  local left=$((in_all - SECONDS))
  if [ "$left" -lt 20 ]; then
    say "$name: left out, $SECONDS of $in_all s are gone"
    return 0
  fi
  [ "$limit" -lt "$left" ] || limit=$left
  echo "== $name: $*" >> "$out/log.txt"
  timeout --signal=TERM --kill-after=15 "$limit" "$@" >> "$out/log.txt" 2>&1 &
  local group=$!
  wait "$group" || status=$?
  if [ "$status" = 124 ]; then sleep 5; fi
  kill -KILL -- "-$group" 2> /dev/null  # what a signal met while it compiled would run beside the next part
  say "$name: exit status $status, $((SECONDS - began)) s"
}

vaediff() { "$python" -m vaediff.main "$@"; }

benchmark() {  # benchmark CONFIG STAGE [FLAG...]: one line of benchmark.jsonl; what is printed before it ends is in log.txt
  local config=$1 stage=$2
  shift 2
  vaediff --config="$config" --stages="$stage" --mode=benchmark --workdir="$runs/none" "${synthetic[@]}" "$@" \
    | tee "$runs/benchmark" && as_line
}

compile() {  # what the other parts run, side by side; their figures are of a busy device, and are left out
  local started=() failed=0 quick=(--config.benchmark.num_repeats=1 --config.benchmark.num_sample_repeats=1)
  for one in "$cifar refiner" "$celeba refiner" "$latent ddgan"; do
    vaediff --config="${one% *}" --stages="${one#* }" --mode=benchmark --workdir="$runs/none" "${synthetic[@]}" \
      "${quick[@]}" &
    started+=($!)
  done
  (runs=$(mktemp -d -p "$runs") && out=$runs && costs) &
  started+=($!)
  (runs=$(mktemp -d -p "$runs") && out=$runs && int8) &
  started+=($!)
  if beside_pytorch; then
    (runs=$(mktemp -d -p "$runs") && pytorch 1) &
    started+=($!)
  fi
  for one in "${started[@]}"; do wait "$one" || failed=1; done
  return "$failed"
}

beside_pytorch() { "$python" -c 'import torch, diffusers' 2> /dev/null; }

pytorch() {  # pytorch ROUNDS
  local device=gpu
  [ "$size" = debug ] && device=cpu
  "$python" -m benchmarks.paired --cases="$torch_cases" --rounds="$1" --dtype=bfloat16 --device="$device" \
    --results="$runs/torch"
}

flags() {  # how long the train step of a small U-Net takes to compile, and then to run, under flags of XLA, side by side
  local started=() failed=0
  for chosen in "" --xla_gpu_enable_triton_gemm=false --xla_gpu_force_compilation_parallelism=8 \
    --xla_gpu_experimental_enable_fusion_autotuner=true; do
    (
      said=$(XLA_FLAGS=$chosen JAX_COMPILATION_CACHE_DIR=$(mktemp -d -p "$runs") vaediff --config="$small" \
        --stages=refiner --mode=benchmark --workdir="$runs/none" "${synthetic[@]}" --config.data.num_classes=10 \
        --config.benchmark.num_repeats=3 | grep 'train step') || exit 1
      echo "XLA_FLAGS='$chosen' $said"
    ) &
    started+=($!)
  done
  for one in "${started[@]}"; do wait "$one" || failed=1; done
  return "$failed"
}

as_line() {  # the object of `--mode=benchmark`, behind what else it prints, as one line
  "$python" -c 'import json, sys; text = sys.stdin.read(); print(json.dumps(json.loads(text[text.index("{\n") :])))' \
    < "$runs/benchmark" >> "$out/benchmark.jsonl"
}

costs() {
  vaediff --config="$plain" --workdir="$runs/costs" "${synthetic[@]}" \
    --config.refiner.train.num_steps=12 '--config.refiner.train.profile_steps=(8,11)' \
    --config.refiner.train.grid_every_steps=0 --config.refiner.sample.num_images=4 \
    --config.refiner.sample.num_steps=2 &&
    "$python" -m benchmarks.costs "$runs/costs/refiner/tensorboard" > "$out/costs.txt"
}

int8() {  # one update, which times need no more than
  vaediff --config="$latent" --workdir="$runs/int8" "${synthetic[@]}" --config.autoencoder.train.num_steps=1 \
    --config.autoencoder.loss.adversarial_start_step=0 --config.autoencoder.loss.perceptual= \
    --config.ddgan.train.num_steps=1 &&
    vaediff --workdir="$runs/int8" --mode=quantize --config.quantize.stage=ddgan --config.quantize.num_images=16 &&
    vaediff --workdir="$runs/int8" --mode=benchmark --stages=ddgan_int8 --config.ddgan_int8.sample.num_images=100 \
      --config.ddgan_int8.sample.batch_size=100 | tee "$runs/benchmark" && as_line
}

train_emoji() {
  local folder="$runs/emoji" status=0
  local flags=(--config="$emoji_config" --workdir="$folder")
  [ "$size" = debug ] || flags+=(--config.data.source=npz "--config.data.path=$emoji")
  # in the foreground: a group of its own would outlive the limit of this part
  timeout --foreground --signal=TERM --kill-after=20 "$emoji_seconds" "$python" -m vaediff.main "${flags[@]}" || status=$?
  echo "training ended with status $status"  # 124: after its seconds, with a checkpoint
  vaediff --workdir="$folder" --mode=sample --out="$folder/out" && cp "$folder/out/samples.png" "$out/emoji.png"
  vaediff --workdir="$folder" --mode=evaluate "--config.evaluate.extractors=$extractors" \
    --config.evaluate.num_images="$emoji_images" --config.evaluate.name=emoji --config.evaluate.num_bound=0 &&
    cp "$folder"/evaluation/emoji.json "$out/emoji.json"
}
export python runs out size emoji emoji_seconds

synthetic=(--config.data.source=synthetic --config.benchmark.matmul_size=8192)
cifar=configs/cifar10.py:bfloat16 celeba=configs/celeba256.py:bfloat16 latent=configs/cifar10.py:latent,bfloat16
small=configs/shapes16.py:unconditional,mini
plain=configs/cifar10.py:unconditional,bfloat16  # whose network is the same, and reads no VAE
emoji_config=configs/emoji64.py:unconditional,bfloat16 extractors="('mobilenetv2',)" emoji_images=2000
torch_cases=unet_cifar10
if [ "$size" = debug ]; then
  cifar=$cifar,debug celeba=$celeba,debug latent=$latent,debug plain=$plain,debug small=$small,debug
  emoji_config=configs/emoji64.py:unconditional,debug
  extractors="('classifier',)" emoji_images=16 torch_cases=unet_small/forward
  export JAX_DISABLE_MOST_OPTIMIZATIONS=1  # compiles sooner
  synthetic+=(--config.benchmark.matmul_size=64 --config.benchmark.num_repeats=1)
fi
functions=$(declare -f vaediff compile benchmark flags as_line beside_pytorch pytorch costs int8 train_emoji
  declare -p synthetic plain small cifar celeba emoji_config latent extractors emoji_images torch_cases)
call() { part "$1" "$2" bash -c "set -uo pipefail; $functions; ${*:3}"; }  # a function of this script, under a limit

"$python" -c '
import jax, platform
print(jax.devices()[0].device_kind, "x", len(jax.devices()), "- jax", jax.__version__, "- Python", platform.python_version())
' 2>> "$out/log.txt" | tee "$out/machine.txt"
for one in $parts; do
  case $one in
    compile) call 'compiling all of them side by side' "${COMPILE_SECONDS:-240}" compile ;;
    benchmark)
      call 'train step and sampler, cifar10 refiner' 240 "benchmark '$cifar' refiner"
      call 'train step and sampler, cifar10 latent GAN' 180 "benchmark '$latent' ddgan"
      call 'train step and sampler, celeba256 refiner' 90 "benchmark '$celeba' refiner"
      ;;
    torch)
      if beside_pytorch; then
        call 'beside PyTorch' 120 pytorch 3
        cp "$runs"/torch/*.json "$out/torch.json" 2> /dev/null
      else
        say 'beside PyTorch: torch and diffusers are not both here'
      fi
      ;;
    costs) call 'costs of a train step' 90 costs ;;
    int8) call 'the latent GAN in int8' 120 int8 ;;
    emoji)
      if [ -e "$emoji" ] || [ "$size" = debug ]; then
        left=$((in_all - SECONDS - 90))  # drawing and measuring take the rest
        [ "$emoji_seconds" -lt "$left" ] || emoji_seconds=$((left > 20 ? left : 20))
        call 'emoji64' $((emoji_seconds + 90)) train_emoji
      else
        say "emoji64: there is no $emoji"
      fi
      ;;
    flags) call 'flags of XLA, one small U-Net each' 120 flags ;;
  esac
done
say "$SECONDS s in all"
