#!/usr/bin/env bash
# Runs what needs a GPU, on a host that has one and nothing else of Canopy: the device tests, the golden
# files, and the benchmark. Build with the preset cuda-portable, then bring this checkout's scripts/,
# data/ and tests/models/golden/ and, from build/cuda-portable, canopy, tests/cuda_tests and libhwy.so.1
# to the host.
#
#   scripts/gpu-tests.sh [--programs DIR] [--models DIR] [--golden DIR] [--report FILE]
#
#   --programs  where canopy, cuda_tests and libhwy.so.1 are        (build/cuda-portable)
#   --models    folders of further checkpoints, compared with NAME/golden.safetensors or
#               GOLDEN/NAME.safetensors where there is one
#   --golden    the folder GOLDEN of those
#   --report    what was run and what came out, in one file         (gpu-report.txt)
# The exit status is 0 if all passed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

programs=build/cuda-portable models='' golden='' report=gpu-report.txt
while [ $# -gt 0 ]; do
  case $1 in
    --programs) programs=$2 ;;
    --models) models=$2 ;;
    --golden) golden=$2 ;;
    --report) report=$2 ;;
    *) echo "usage: $0 [--programs DIR] [--models DIR] [--golden DIR] [--report FILE]" >&2; exit 2 ;;
  esac
  shift 2
done
tests=$programs/cuda_tests
[ -x "$tests" ] || tests=$programs/tests/cuda_tests
for program in "$programs/canopy" "$tests"; do
  [ -x "$program" ] || { echo "$program is not there; build the preset cuda-portable" >&2; exit 1; }
done
# Highway is a shared library; it lies beside the programs or is the system's.
export LD_LIBRARY_PATH="$programs${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

failed=0
say() { echo "$@" | tee -a "$report"; }
run() { "$@" 2>&1 | tee -a "$report"; }

: >"$report" || exit 1
say "date $(date -u +%F)"
say "gpu $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>&1 | head -n 1)"
say "program $("$programs/canopy" --version)"

say "== device tests"
run timeout 900 "$tests" --gtest_brief=1 || failed=1

# Reference logits are f32 throughout. In bf16 activations are rounded to 8 bits at every product, so
# there the differences are shown and not judged; the device tests judge bf16 by the CPU.
compare() {
  local model=$1 file=$2 dtype
  for dtype in f32 bf16; do
    printf '%-5s %s ' "$dtype" "$model" | tee -a "$report"
    if [ $dtype = f32 ]; then
      run timeout 120 "$programs/canopy" golden --model "$model" --golden "$file" --device=cuda \
        --dtype=f32 || failed=1
    else
      run timeout 120 "$programs/canopy" golden --model "$model" --golden "$file" --device=cuda \
        --dtype=bf16 --tolerance=1 || true
    fi
  done
}
say "== golden files"
for model in data/models/* tests/models/golden/*/ ${models:+"$models"/*}; do
  model=${model%/}
  file=$model/golden.safetensors
  [ -f "$file" ] || file=$golden/$(basename "$model").safetensors
  [ -f "$model/config.json" ] && [ -f "$file" ] && compare "$model" "$file"
done

say "== benchmark"
run "$programs/canopy" bench --model synthetic:mamba2-2.7b --device=cuda --compare || failed=1
run "$programs/canopy" bench --model synthetic:llama-8b --device=cuda || failed=1

say "== compute-sanitizer memcheck"
if command -v compute-sanitizer >/dev/null; then
  filter='*TreeEqualsTokenByToken/ssd_bf16:*SelectsTheGreatestLogits/hybrid_bf16:*Prefill*/attention_f32'
  timeout 600 compute-sanitizer --tool memcheck --error-exitcode 1 "$tests" --gtest_brief=1 \
    --gtest_filter="$filter" 2>&1 | tail -n 4 | tee -a "$report"
  [ "${PIPESTATUS[0]}" = 0 ] || failed=1
else
  say "compute-sanitizer is not installed: not run"
fi
[ $failed = 0 ] && say "all passed" || say "FAILED"
exit $failed
