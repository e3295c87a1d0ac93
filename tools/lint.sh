#!/usr/bin/env bash
# Checks the form of the sources: clang-format on every C++ and CUDA file, clang-tidy on the changed ones.
#
#   tools/lint.sh [--base REV] [--fix]
#
#   --base REV   also clang-tidy on the .cpp files that differ from REV (default: none), with the flags of the build folder
#   --fix        format in place instead of checking
#
# MOEGRAFT_BUILD_DIR   build folder (default: build), for clang-tidy       MOEGRAFT_TIDY_FILES   at most so many files (default: 20)
# The tools are those that third_party/requirements-lint.txt pins, from .venv (tools/setup.sh --tests installs them) or PATH: other versions
# break lines elsewhere.
set -euo pipefail
cd "$(dirname "$0")/.."
base="" fix=0
while [ $# -gt 0 ]; do
  case $1 in
  -h | --help) sed -n '2,/^set -/p' "$0" | sed '$d;s/^# \{0,1\}//'; exit 0 ;;
  --base) base=${2:?--base needs a revision}; shift 2 ;;
  --fix) fix=1; shift ;;
  *) echo "lint: unknown option $1; tools/lint.sh --help lists them" >&2; exit 2 ;;
  esac
done

# find_tool NAME: its path, in the pinned version.
find_tool() {
  local wanted path
  wanted=$(sed -n "s/^$1==//p" third_party/requirements-lint.txt)
  for path in ".venv/bin/$1" "$(command -v "$1" || true)"; do
    [ -x "$path" ] || continue
    if "$path" --version | grep -qF "$wanted"; then echo "$path"; return; fi
  done
  echo "lint: $1 $wanted is not there; tools/setup.sh --tests installs it, or: pip install -r third_party/requirements-lint.txt" >&2
  exit 2
}

format=$(find_tool clang-format)
mapfile -t files < <(git ls-files -- '*.h' '*.cpp' '*.cu' '*.cuh' '*.inc')
if [ "$fix" = 1 ]; then
  printf '%s\n' "${files[@]}" | xargs -P "$(nproc)" -n 50 "$format" -i
  echo "lint: ${#files[@]} files formatted"
else
  wrong=$(printf '%s\n' "${files[@]}" | xargs -P "$(nproc)" -n 50 "$format" --dry-run 2>&1 | sed -n 's/^\([^:]*\):.*clang-format-violations.*/\1/p' | sort -u)
  if [ -n "$wrong" ]; then
    echo "lint: not formatted as .clang-format says; tools/lint.sh --fix does it:" >&2
    sed 's/^/  /' <<<"$wrong" >&2
    exit 1
  fi
  echo "lint: ${#files[@]} files are formatted"
fi

[ -n "$base" ] || exit 0
git rev-parse --verify -q "$base^{commit}" >/dev/null || { echo "lint: --base $base is no revision of this repository" >&2; exit 2; }
build=${MOEGRAFT_BUILD_DIR:-build} most=${MOEGRAFT_TIDY_FILES:-20}
[ -e "$build/compile_commands.json" ] || { echo "lint: $build/compile_commands.json is not there: clang-tidy needs a configured build (cmake --preset cpu)" >&2; exit 2; }
tidy=$(find_tool clang-tidy)
mapfile -t changed < <(git diff --name-only --diff-filter=d "$base" -- '*.cpp')
# Only what this build compiles.
mapfile -t changed < <(for f in "${changed[@]}"; do if grep -qF "/$f\"" "$build/compile_commands.json"; then echo "$f"; fi; done)
if [ ${#changed[@]} -gt "$most" ]; then
  echo "lint: ${#changed[@]} files changed since $base; clang-tidy looks at the first $most"
  changed=("${changed[@]:0:$most}")
fi
[ ${#changed[@]} -gt 0 ] || { echo "lint: no .cpp file of this build changed since $base"; exit 0; }
# GCC's flags for clang: what it does not know is left out, and OpenMP's header, which is GCC's own here, is what LibTorch's headers call of it.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
sed -E 's/ -fvect-cost-model=[a-z-]+//g; s/ -Winvalid-pch//g' "$build/compile_commands.json" >"$work/compile_commands.json"
mkdir "$work/include"
echo 'extern "C" { int omp_get_max_threads(); int omp_get_num_threads(); int omp_get_thread_num(); int omp_in_parallel(); void omp_set_num_threads(int); }' >"$work/include/omp.h"
found=$(printf '%s\n' "${changed[@]}" | xargs -P "$(nproc)" -n 1 "$tidy" -p "$work" --quiet --extra-arg="-isystem$work/include" 2>/dev/null | grep -E '^[^ ].*: (warning|error):' | sed "s#^$PWD/##" | sort -u || true)
if [ -n "$found" ]; then
  echo "lint: clang-tidy finds in files changed since $base:" >&2
  sed 's/^/  /' <<<"$found" >&2
  exit 1
fi
echo "lint: clang-tidy finds nothing in ${#changed[@]} files changed since $base"
