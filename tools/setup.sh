#!/usr/bin/env bash
# Installs what moegraft needs to build and run. Safe to repeat: it only adds what is missing.
#
#   tools/setup.sh [--runtime | --tests] [--arrow] [--cuda | --no-cuda] [--check]
#
#   --runtime   (default) compiler, libraries, data packages, and LibTorch in the project-local environment .venv
#   --tests     also the Python packages that the golden tests compare with, and Apache Arrow
#   --arrow     also Apache Arrow (the pyarrow wheel, 55 MB to load, 170 MB on disk): Hugging Face data sets as Parquet and Arrow files are read directly
#   --cuda      also LibTorch's CUDA libraries, and a CUDA compiler if the machine has none (default: only if a GPU is there)
#   --no-cuda   not those, even with a GPU
#   --check     install nothing, say what is missing; exit 1 if something is
#
# MOEGRAFT_VENV names another environment folder. A LibTorch on CMAKE_PREFIX_PATH is used instead of the wheel (--runtime).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${MOEGRAFT_VENV:-.venv}
profile=runtime arrow=0 cuda=auto check=0
for arg in "$@"; do
  case $arg in
    --runtime) profile=runtime ;;
    --tests) profile=tests arrow=1 ;;
    --arrow) arrow=1 ;;
    --cuda) cuda=1 ;;
    --no-cuda) cuda=0 ;;
    --check) check=1 ;;
    -h | --help) sed -n '2,/^set -/p' "$0" | sed '$d;s/^# \{0,1\}//'; exit 0 ;;
    *) echo "setup: unknown option $arg (try --help)" >&2; exit 2 ;;
  esac
done
if [ "$cuda" = auto ]; then
  cuda=0
  nvidia-smi -L 2>/dev/null | grep -q GPU && cuda=1
fi

begin=$SECONDS
missing=0
say() { echo "setup: $*"; }
die() { echo "setup: error: $*" >&2; exit 1; }
# need WHAT: counts and names something absent; true when it should be installed now.
need() {
  if [ "$check" = 1 ]; then
    say "missing: $*"
    missing=1
    return 1
  fi
}
free_mib() { df -Pm "$1" | awk 'NR==2 {print $4}'; }

# 1. System packages ---------------------------------------------------------------------------------------------------------------
packages() { sed 's/#.*//' third_party/apt-packages.txt | xargs; }
if command -v dpkg-query >/dev/null; then
  absent=()
  for package in $(packages); do
    dpkg-query -W -f='${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || absent+=("$package")
  done
  if [ ${#absent[@]} -gt 0 ] && need "system packages ${absent[*]}"; then
    sudo=()
    if [ "$(id -u)" != 0 ]; then
      command -v sudo >/dev/null || die "these packages are missing and installing them needs root or sudo: ${absent[*]}"
      sudo=(sudo)
    fi
    start=$SECONDS
    say "installing ${#absent[@]} system packages (about a minute): ${absent[*]}"
    log=$(mktemp)
    apt() { "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 "$@" >>"$log" 2>&1; }
    apt update || say "warning: apt-get update failed; trying with the package lists at hand"
    apt install -y --no-install-recommends "${absent[@]}" || { tail -n 20 "$log" >&2; die "apt-get install failed (full log: $log)"; }
    rm -f "$log"
    say "system packages done in $((SECONDS - start)) s"
  fi
else
  say "warning: no dpkg here; install the equivalents of: $(packages)"
fi

# 2. LibTorch, and the Python references ---------------------------------------------------------------------------------------------
own_torch=
IFS=: read -r -a prefixes <<<"${CMAKE_PREFIX_PATH:-}"
for prefix in "${prefixes[@]}"; do
  [ -n "$prefix" ] && [ -e "$prefix/share/cmake/Torch/TorchConfig.cmake" ] && own_torch=$prefix && break
done

requirements=()
case $profile in
  runtime) [ -n "$own_torch" ] || requirements=(third_party/requirements-runtime.txt) ;;
  tests) requirements=(third_party/requirements-tests.txt third_party/requirements-lint.txt) ;;
esac
[ "$arrow" = 0 ] || requirements+=(third_party/requirements-arrow.txt)
if [ "$cuda" = 1 ] && [ -z "$own_torch" ]; then
  requirements+=(third_party/requirements-cudnn-frontend.txt)
  [ "$profile" = tests ] || requirements+=(third_party/requirements-cuda.txt)
  [ -n "${CUDACXX:-}" ] || command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ] || requirements+=(third_party/requirements-cuda-toolkit.txt)
fi
[ -z "$own_torch" ] || say "LibTorch from CMAKE_PREFIX_PATH: $own_torch"

# pins FILE: the pins of the file that the environment does not meet.
pins() { "$venv/bin/python" third_party/check_requirements.py "$1"; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check -q --no-input "$@"; }
if [ ${#requirements[@]} -gt 0 ] && [ ! -x "$venv/bin/python" ] && need "environment $venv ($([ "$profile" = runtime ] && [ -n "$own_torch" ] && echo Arrow || echo LibTorch))"; then
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "Python 3.10 or newer is needed, got $(python3 --version)"
  say "making the environment $venv"
  python3 -m venv "$venv"
fi
if [ -x "$venv/bin/python" ]; then
  for file in "${requirements[@]}"; do
    unmet=$(pins "$file")
    if [ -z "$unmet" ] || ! need "in $venv: $(echo "$unmet" | paste -sd ';')"; then continue; fi
    case $file in
      *runtime*) needed=3000 size="0.6 GB to load" options=(--no-deps) ;;
      *lint*) needed=300 size="40 MB to load" options=(--no-deps) ;;
      *arrow*) needed=400 size="55 MB to load" options=(--no-deps) ;;
      *cudnn-frontend*) needed=100 size="11 MB to load" options=(--no-deps) ;;
      *cuda-toolkit*) needed=1000 size="0.2 GB to load" options=(--no-deps) ;;
      *cuda*) needed=6000 size="1.6 GB to load" options=(--no-deps) ;;
      *) needed=12000 size="2.5 GB to load, a few minutes" options=(-c third_party/constraints.txt) ;;
    esac
    [ "$(free_mib "$venv")" -ge $needed ] || die "$venv needs $needed MiB of free disk for $file, $(free_mib "$venv") MiB are free"
    start=$SECONDS
    say "installing $file into $venv ($size)"
    pip install "${options[@]}" -r "$file" || die "pip could not install $file; a repeated run continues where it stopped"
    say "$file done in $((SECONDS - start)) s"
  done
  # Wheels carry libcudart.so.13 but no libcudart.so, the name a linker looks for.
  if [ "$cuda" = 1 ] && [ "$check" = 0 ]; then
    for library in "$venv"/lib/python3*/site-packages/nvidia/*/lib/lib*.so.*; do
      plain=${library%%.so.*}.so
      [ -e "$library" ] && [ ! -e "$plain" ] && ln -s "$(basename "$library")" "$plain"
    done
    # nvcc searches lib64, the wheels fill lib.
    for root in "$venv"/lib/python3*/site-packages/nvidia/cu*; do
      [ -e "$root/bin/nvcc" ] && [ ! -e "$root/lib64" ] && ln -s lib "$root/lib64"
    done
  fi
fi

# 3. Does it load? ------------------------------------------------------------------------------------------------------------------
for library in "$venv"/lib/python3*/site-packages/torch/lib/libtorch_cpu.so; do
  if [ -n "$own_torch" ] || [ ! -e "$library" ]; then continue; fi
  "$venv/bin/python" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$library" || { say "$library does not load"; missing=1; }
done
[ "$missing" = 0 ] || die "something is missing; run tools/setup.sh${profile:+ --$profile} without --check"
say "ready ($profile$([ "$arrow" = 1 ] && echo ", arrow")$([ "$cuda" = 1 ] && echo ", cuda")) in $((SECONDS - begin)) s"
