#!/usr/bin/env bash
# Installs what is missing, builds everything, and runs all tests. Arguments go to ctest, for example
# `-R Acceptance` (tests by name) or `-LE slow` (without the long ones).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

step "Packages"
scripts/install-deps.sh test

step "Build"
cmake --preset release --log-level=WARNING -DCANOPY_BUILD_TESTS=ON -DCANOPY_BUILD_BENCHMARKS=ON
ninja -C build/release

step "Tests"
ctest --test-dir build/release --parallel "$(nproc)" --output-on-failure "$@"
