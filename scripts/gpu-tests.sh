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

# Reference logits are f32 throughout. In bf16 activations are rounded to 8 bits at every product, and
# how much that changes logits depends on the model. So there a model may be as far from the reference
# as the reference's own bfloat16 is (bf16_errors.tsv), and half as much again, since both are largest
# values of some thousand random ones. What is not in that file is shown and not judged.
compare() {
  local model=$1 file=$2 dtype tolerance
  for dtype in f32 bf16; do
    tolerance=0.002
    [ $dtype = f32 ] || tolerance=$(awk -v name="$(basename "$model")" \
      '$1 == name { print 1.5 * $2 }' tests/models/golden/bf16_errors.tsv)
    printf '%-5s %-6s %s ' "$dtype" "${tolerance:-none}" "$model" | tee -a "$report"
    run timeout 120 "$programs/canopy" golden --model "$model" --golden "$file" --device=cuda \
      --dtype=$dtype --tolerance="${tolerance:-1000}" || [ -z "$tolerance" ] || failed=1
  done
}
say "== golden files (type, largest difference that is allowed, model)"
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
# check NAME COMMAND...: one command under memcheck.
check() {
  local name=$1 output status
  shift
  output=$(timeout 120 compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 "$@" 2>&1)
  status=$?
  say "$name: $(grep -o 'ERROR SUMMARY.*' <<<"$output" || echo "exit status $status")"
  [ $status = 0 ] || failed=1
}
if ! command -v compute-sanitizer >/dev/null; then
  say "not run: compute-sanitizer is not installed"
else
  for model in data/models/* tests/models/golden/*/; do
    model=${model%/}
    [ -f "$model/golden.safetensors" ] || continue
    for dtype in bf16 f32; do
      check "$dtype $model" "$programs/canopy" golden --model "$model" \
        --golden "$model/golden.safetensors" --device=cuda --dtype=$dtype --tolerance=1000
    done
  done
  for filter in '*SelectsTheGreatestLogits/ssd_bf16' '*SelectsTheGreatestLogits/attention_bf16' \
    '*TreeEqualsTokenByToken/hybrid_bf16' '*SelectsTheGreatestLogits/ssd_f32' \
    '*SelectsTheGreatestLogits/attention_f32' '*TreeEqualsTokenByToken/hybrid_f32' \
    '*TreeEqualsTokenByToken/ssd_f32' '*AreNotRepeated*' \
    '*BatchNeighboursDoNotMatter/ssd_strips_bf16' '*DeepestTree*/ssd_strips_bf16' \
    'PromisedCuda.PromisedPendingNodesAreResolved'; do
    check "device tests $filter" "$tests" --gtest_brief=1 --gtest_filter="$filter"
  done
fi
[ $failed = 0 ] && say "all passed" || say "FAILED"
exit $failed
