#!/usr/bin/env bash
# Builds, tests and measures everything on one GPU machine, in one call of under nine minutes, or more of it in three:
#
#   bash bench/gpu.sh                     all three: 515 s at most; the rest has what the others leave
#   SECTIONS=kernels bash bench/gpu.sh    build, tests, every op, training steps: 515 s at most
#   SECTIONS=models  bash bench/gpu.sh    build, steps and requests of the full model: 515 s at most
#   SECTIONS=rest    bash bench/gpu.sh    build, cold start, stage 2 at full depth, offloading: 515 s at most
#   SECTIONS="build requests" bash bench/gpu.sh    one section with all of the time
#
# Needs nothing but this repository, python3 with torch, transformers and pytest, and nvcc; no network.
# Sections that fail or run out of time do not stop the others; a table at the end says how each went. Rows are written
# as they are measured, case by case, the most wanted first, so a section that runs out of time leaves what it had; a
# later call with the same OUT and commit goes on with the cases of `steps` and `requests` that have no rows yet. A
# request is timed up to nine times, as often as its section's time allows.
#
#   OUT       folder for rows (<bench>.jsonl), log.txt and summary.txt; default ./out
#   WHEELS    folder of wheels (diffusers, deepspeed, torchao and what they need) to use without installing them
#   SECTIONS  which to run: "kernels", "models", "rest", or names of sections; default all three
#             "cold_start" writes a checkpoint of 39 to 48 GiB and times new processes until a picture
#             "train_memory" trains stage 2 at full depth, its optimizer in host memory (92 GiB there)
#             "offload" copies the full-size model to pinned memory and draws, once for every level
#             "tiny" is in none: it trains the model tiny for the time that is left, and goes on where an earlier call
#             stopped: its parts, scores and, at the end, weights go to OUT/tiny
#   DEADLINE  seconds for all sections together, default 515
#   DRY_RUN   1 runs the same sections at a tiny size, on a CPU too
#   PYTHON    default python3
#   UNIWORLD_COMMIT  what rows call the commit where there is no git
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
ROOT=$PWD
OUT=${OUT:-$ROOT/out}
WHEELS=${WHEELS:-}
KERNELS="build kernel_tests gpu_tests ops ema alone train_step region_mask"
MODELS="build steps requests dit_step generate decode load"
REST="build cold_start train_memory offload"
SECTIONS=${SECTIONS:-kernels models rest}
DEADLINE=${DEADLINE:-515}
SECTIONS=${SECTIONS/kernels/$KERNELS}
SECTIONS=${SECTIONS/models/$MODELS}
SECTIONS=${SECTIONS/rest/$REST}
DRY_RUN=${DRY_RUN:-0}
PYTHON=${PYTHON:-python3}

mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
LOG=$OUT/log.txt
SUMMARY=$OUT/summary.txt
: >"$LOG"
printf '%-14s %10s %9s  %s\n' section rc seconds 'last line' >"$SUMMARY"

SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 UNIWORLD_BENCH_ROWS=$OUT UNIWORLD_CACHE=$SCRATCH/cache
export TORCHINDUCTOR_CACHE_DIR=$SCRATCH/inductor
if [ "$DRY_RUN" = 1 ]; then
  export UNIWORLD_BENCH_SIZE=tiny
fi

# Seconds of each section where all of its group run. What is wanted shares the time that is left, but for the build, in
# these proportions.
declare -A LIMITS=(
  [build]=60
  [kernel_tests]=105 [gpu_tests]=50 [ops]=125 [ema]=20 [alone]=55 [train_step]=90 [region_mask]=10
  [steps]=195 [requests]=195 [dit_step]=20 [generate]=20 [decode]=10 [load]=15
  [cold_start]=160 [train_memory]=135 [offload]=160 [tiny]=420
)
# Those of the rest that leave nothing in less: they run last, each if that is left, and nothing is kept for them.
declare -A LEAST=([cold_start]=150 [train_memory]=120 [offload]=100)

wanted() { [[ " $SECTIONS " == *" $1 "* ]]; }

TOGETHER=0 LAST=0 # of all wanted sections that are still to come, and of those of the rest
for name in $(tr ' ' '\n' <<<"$SECTIONS" | sort -u); do
  if [ -n "${LEAST[$name]:-}" ]; then
    LAST=$((LAST + LIMITS[$name]))
  elif [ "$name" != build ]; then
    TOGETHER=$((TOGETHER + ${LIMITS[$name]:-0}))
  fi
done

remaining() { echo $((DEADLINE - SECONDS)); }

# section NAME COMMAND...: run it with a time limit, append its output to the log, add a line to the summary.
section() {
  local name=$1 limit left least rc began=$SECONDS part=$SCRATCH/$1.txt
  shift
  wanted "$name" || return 0
  limit=${LIMITS[$name]} least=${LEAST[$name]:-10} left=$(remaining)
  if [ -n "${LEAST[$name]:-}" ]; then
    LAST=$((LAST - limit))
    limit=$((limit * left / (TOGETHER + LAST + limit)))
    [ "$limit" -ge "$least" ] || limit=$least
  elif [ "$name" != build ]; then
    TOGETHER=$((TOGETHER - limit))
    limit=$((limit * left / (TOGETHER + limit)))
  fi
  if [ "$left" -lt "$least" ] && [ "$DRY_RUN" != 1 ] || [ "$left" -lt 10 ]; then
    printf '%-14s %10s %9s  %s\n' "$name" 'not run' 0 "$left s are left, $least wanted" >>"$SUMMARY"
    return 0
  fi
  [ "$limit" -lt "$left" ] && [ "$DRY_RUN" != 1 ] || limit=$left # a dry run may compile for minutes on a CPU
  printf '\n==== %s (at most %s s): %s\n' "$name" "$limit" "$*" | tee -a "$LOG"
  UNIWORLD_BENCH_UNTIL=$(($(date +%s) + limit)) timeout -k 10 "$limit" "$@" >"$part" 2>&1
  rc=$?
  cat "$part" >>"$LOG"
  tail -n 15 "$part"
  case $rc in
    124 | 137)
      rc="$rc (time)"
      rm -rf "$TORCHINDUCTOR_CACHE_DIR" # a library that was being written is there, but cut off
      ;;
    5) [[ $name == *tests ]] && rc='5 (no tests)' ;;
  esac
  printf '%-14s %10s %9s  %s\n' "$name" "$rc" $((SECONDS - began)) "$(tail -n 1 "$part" | cut -c1-100)" >>"$SUMMARY"
}

# In a process of its own, so that a machine without a working CUDA does not end the script.
describe_machine() {
  nvidia-smi 2>&1 | head -n 15
  "$PYTHON" - <<'PY'
import platform, torch
from importlib import metadata
found = {}
for name in ("torch", "triton", "transformers", "diffusers", "deepspeed", "torchao", "pybind11", "pytest", "pytest-benchmark", "setuptools"):
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        found[name] = "missing"
print("python", platform.python_version(), found)
print("cuda", torch.version.cuda, torch.cuda.get_device_name() if torch.cuda.is_available() else "no device")
PY
}

if [ -n "$WHEELS" ]; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$SCRATCH/site" "$WHEELS"/*.whl 2>&1 | tee -a "$LOG"
  export PYTHONPATH=$SCRATCH/site:$PYTHONPATH
fi
describe_machine 2>&1 | tee -a "$LOG"

# Only the architecture of this device: three of them take three times as long.
if [ -z "${UNIWORLD_CUDA_ARCHS:-}" ]; then
  UNIWORLD_CUDA_ARCHS=$("$PYTHON" -c '
import torch
if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    print(f"{major}{minor}" + ("a" if major >= 9 else ""))' 2>/dev/null)
fi
[ -z "$UNIWORLD_CUDA_ARCHS" ] || export UNIWORLD_CUDA_ARCHS

PYTEST=("$PYTHON" -m pytest -q -p no:cacheprovider)
PARALLEL=()
if "$PYTHON" -c 'import xdist' 2>/dev/null && [ "$(nproc)" -ge 8 ]; then
  PARALLEL=(-n 6)
fi
SOME=() # what of the long sections a dry run takes
if [ "$DRY_RUN" = 1 ]; then
  SOME=(-k "flow_step or adaln_modulate")
fi

section build "$PYTHON" setup.py build_ext --inplace
section kernel_tests "${PYTEST[@]}" "${PARALLEL[@]}" "${SOME[@]}" tests/test_kernels.py
section gpu_tests "${PYTEST[@]}" "${PARALLEL[@]}" -m gpu tests
section steps "${PYTEST[@]}" -k "gemm or step" bench/full_scale.py
section requests "${PYTEST[@]}" -k "request or overhead" bench/full_scale.py
section ops "${PYTEST[@]}" "${SOME[@]}" bench/ops.py
section ema "${PYTEST[@]}" bench/ema.py
section alone "${PYTEST[@]}" bench/alone.py
section train_step "${PYTEST[@]}" bench/train_step.py
section dit_step "${PYTEST[@]}" bench/dit_step.py
section generate "${PYTEST[@]}" bench/generate.py
section decode "${PYTEST[@]}" bench/decode.py
section load "${PYTEST[@]}" bench/load.py
section region_mask "${PYTEST[@]}" bench/region_mask.py
section cold_start "${PYTEST[@]}" bench/cold_start.py
section train_memory "${PYTEST[@]}" bench/train_memory.py
section offload "${PYTEST[@]}" bench/offload.py

# Half a minute is kept for saving and copying.
train_tiny() {
  local seconds=$((UNIWORLD_BENCH_UNTIL - $(date +%s) - 30)) name rc
  "$PYTHON" -m uniworld.cli train-tiny -o runs/tiny --wider 8 --minutes "$(awk "BEGIN { print $seconds / 60 }")"
  rc=$?
  for name in vae vlm semantic_encoder base redux align task_head model; do
    mkdir -p "$OUT/tiny/$name"
    cp -r runs/tiny/"$name"/{model,scores.json,samples.png,metrics.jsonl} "$OUT/tiny/$name/" 2>/dev/null
  done
  cp -r runs/tiny/model "$OUT/tiny/" 2>/dev/null
  [ "$rc" = 143 ] && echo "not finished; the same call goes on" && return 0
  return "$rc"
}
export -f train_tiny
export PYTHON OUT
section tiny bash -c train_tiny

echo
echo "all sections: $SECONDS s" | tee -a "$SUMMARY"
cat "$SUMMARY"
