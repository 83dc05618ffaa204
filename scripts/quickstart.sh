#!/usr/bin/env bash
# Installs what is missing, builds canopy, and runs the bundled experiment (configs/quickstart.cfg).
# Needs no network but apt's; arguments go to `canopy run`, for example --run.threads=4.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

step "Packages"
scripts/install-deps.sh build

step "Build of build/release/canopy"
# A build folder that is set up already keeps its settings; a new one leaves out what needs GoogleTest.
options=()
[ -e build/release/CMakeCache.txt ] ||
  options=(-DCANOPY_BUILD_TESTS=OFF -DCANOPY_BUILD_BENCHMARKS=OFF)
cmake --preset release --log-level=WARNING ${options[@]+"${options[@]}"}
ninja -C build/release canopy

step "Experiment of configs/quickstart.cfg"
build/release/canopy run configs/quickstart.cfg "$@"

step "Done"
cat <<'END'
Next:
  build/release/canopy generate --target data/models/tiny-bamba-4m --draft data/models/tiny-draft-m2 \
      --prompt "A box has 60 crayons. One third of them are red. How many are not red?"
  build/release/canopy run configs/sweep.cfg         two targets x two drafts x three trees
  build/release/canopy inspect data/models/tiny-bamba-4m
  build/release/canopy list                          what a config file can name
README.md says how to run your own models and Spec-Bench.
END
