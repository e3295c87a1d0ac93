#!/usr/bin/env bash
# Sets up, builds everything and runs all tests; the last line says how it went.
#
#   tools/test.sh [ctest options]        e.g. tools/test.sh -R tokenizer
#
# MOEGRAFT_BUILD_DIR  build folder (default: build)      MOEGRAFT_CUDA  ON or OFF (default: OFF, or ON where a GPU and nvcc are)
# MOEGRAFT_SKIP_SETUP=1 leaves the set-up out.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in -h | --help) sed -n '2,/^set -/p' "$0" | sed '$d;s/^# \{0,1\}//'; exit 0 ;; esac
build=${MOEGRAFT_BUILD_DIR:-build}
# Waiting OpenMP threads must not spin: tests run side by side on few cores.
export OMP_WAIT_POLICY=PASSIVE

begin=$SECONDS
stage="" stage_begin=$SECONDS summary=""
next() {
  [ -z "$stage" ] || summary+="$stage $((SECONDS - stage_begin)) s, "
  stage=$1 stage_begin=$SECONDS
  [ -z "$stage" ] || echo "== $stage"
}
finish() {
  local code=$?
  if [ $code = 0 ]; then
    echo "tests: PASSED in $((SECONDS - begin)) s (${summary%, })"
  else
    echo "tests: FAILED at stage '$stage' after $((SECONDS - begin)) s" >&2
  fi
}
trap finish EXIT

next setup
[ "${MOEGRAFT_SKIP_SETUP:-0}" = 1 ] || bash tools/setup.sh --tests

next configure
cuda=${MOEGRAFT_CUDA:-}
if [ -z "$cuda" ]; then
  cuda=OFF
  if nvidia-smi -L 2>/dev/null | grep -q GPU && { command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ] || ls .venv/lib/python3*/site-packages/nvidia/cu*/bin/nvcc >/dev/null 2>&1; }; then
    cuda=ON
  fi
fi
cmake -S . -B "$build" --preset ci -DMOEGRAFT_CUDA="$cuda" >"${TMPDIR:-/tmp}/moegraft-configure.$$" || { cat "${TMPDIR:-/tmp}/moegraft-configure.$$"; exit 1; }
grep -E '^-- (LibTorch|CUDA) ' "${TMPDIR:-/tmp}/moegraft-configure.$$" || true
rm -f "${TMPDIR:-/tmp}/moegraft-configure.$$"

next build
cmake --build "$build"

next tests
ctest --test-dir "$build" --output-on-failure --timeout 900 "$@"
next ""
