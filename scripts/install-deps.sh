#!/usr/bin/env bash
# Installs the Debian packages that Canopy needs and that are missing; installs nothing else.
#
#   scripts/install-deps.sh          what the canopy program is built from
#   scripts/install-deps.sh test     and what the tests and benchmarks need
#   scripts/install-deps.sh ci       and the checkers and fuzzers of .ci/run
#
# Made for Debian 12 and Ubuntu 24.04. Elsewhere it lists the packages and stops if one is missing.
set -euo pipefail

level=${1:-build}
packages=(g++ cmake ninja-build pkg-config libabsl-dev libboost-program-options-dev
          libpcre2-dev libhwy-dev libutf8proc-dev nlohmann-json3-dev)
case $level in
  build) why="to build canopy" ;;
  test) why="to build canopy and its tests"
        packages+=(libgtest-dev libgmock-dev libbenchmark-dev) ;;
  ci) why="to build, test and check canopy"
      packages+=(ccache libgtest-dev libgmock-dev libbenchmark-dev git clang libclang-rt-dev llvm
                 clang-format clang-tidy) ;;
  *) echo "usage: $0 [build|test|ci]" >&2; exit 2 ;;
esac

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  cat >&2 <<END
This is not a Debian or Ubuntu system, so nothing was installed. Canopy needs, by the names that
Debian 12 gives them:
  ${packages[*]}
Install their like and build with:
  cmake --preset release -DCANOPY_BUILD_TESTS=OFF -DCANOPY_BUILD_BENCHMARKS=OFF
  ninja -C build/release canopy
END
  exit 1
fi

missing=()
for package in "${packages[@]}"; do
  status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
  [ "$status" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
  echo "All packages needed $why are installed."
  exit 0
fi
echo "Missing $why: ${missing[*]}"

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null; then
    echo "There is no sudo here. Run this as root, then start again:" >&2
    echo "  apt-get update && apt-get install --no-install-recommends ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
  sudo -n true 2>/dev/null || { echo "sudo asks for your password:"; sudo -v; }
fi
echo "Installing them with apt-get."
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() {
  # Waits for another apt, such as the one that a new machine runs by itself.
  ${as_root[@]+"${as_root[@]}"} env DEBIAN_FRONTEND=noninteractive \
    apt-get -q -y -o DPkg::Lock::Timeout=300 "$@" </dev/null >"$log" 2>&1 && return
  echo "apt-get $1 failed:" >&2
  tail -n 20 "$log" >&2
  exit 1
}
apt update
apt install --no-install-recommends "${missing[@]}"
echo "Installed."
