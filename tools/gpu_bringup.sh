#!/usr/bin/env bash
# The first run on a GPU, from a packed build to a table of what works and how fast it is.
#
#   tools/gpu_bringup.sh pack                      where the project is built (nvcc 13, no card needed): .gpu/packed.tar.gz holds programs and libraries
#   tools/gpu_bringup.sh tests|micro|step          on the machine with the card, each within 10 minutes; several in one call run one after the other
#   tools/gpu_bringup.sh report                    a Markdown table of whatever the stages have written (OUT/report.md)
#   tools/gpu_bringup.sh dry-run                   pack, the three stages and report on a CPU in tiny sizes, without nvcc: that the script still runs
#
#   --out DIR      results: JSON, XML, CSV and logs (default: $OUT, or runs/gpu)      --device cuda|cpu   (default: cuda; cpu: tiny sizes)
#   --packed DIR   what pack writes and the stages run (default: .gpu)                --build DIR         what pack builds (default: build-cuda)
#   --only A,B     these parts of a stage alone (names: OUT/STAGE/parts.jsonl)        --scratch DIR       models and runs (default: /dev/shm where 40 GiB
#                                                                                                         are free, else $TMPDIR)
#   --seconds N    what a stage may take (default: tests 420, micro 400, step 560)
# Folders are taken from where the command is called. A stage that runs again keeps its earlier results in OUT/STAGE.before.
#
# The machine with the card needs Linux on x86-64, an NVIDIA driver for CUDA 13, and a Python with torch 2.11 for CUDA 13 (MOEGRAFT_PYTHON, .venv or python3);
# safetensors for the trainings, transformers and peft for the peers' figures, compute-sanitizer and ncu for those parts. What is not there is skipped, with the reason. Every part has a time
# limit of its own, so that one that hangs costs no other. Nothing is installed.
#
# Example, on a rented card:
#   tools/gpu_bringup.sh pack && git archive --format=tar -o ../gpu.tar HEAD && tar rf ../gpu.tar .gpu      # here
#   mkdir gpu && tar xf gpu.tar -C gpu && gpu/tools/gpu_bringup.sh tests micro step report --out results   # there
# Stages: tests (is it right: the test suite's GPU cases, a real training killed and resumed, sanitizers), micro (what torch's kernels reach at the sizes of
# Qwen3-30B-A3B, ours, and transformers + PEFT), step (tokens/s, memory and kernels of a whole step on all 48 layers, a training, decoding).
set -euo pipefail
called_from=$PWD
cd "$(dirname "$0")/.."
root=$PWD
usage() { sed -n '2,/^set -/p' "$root/tools/gpu_bringup.sh" | sed '$d;s/^# \{0,1\}//'; }
die() { echo "gpu_bringup: $*" >&2; exit 2; }

declare -A given=()
device=cuda out=${OUT:-runs/gpu} packed=.gpu build='' only='' scratch='' seconds='' stages=()
while [ $# -gt 0 ]; do
  case $1 in
    pack | tests | micro | step | report | dry-run) stages+=("$1"); shift ;;
    --device | --out | --packed | --build | --only | --scratch | --seconds) [ $# -ge 2 ] && [ -n "$2" ] || die "$1 needs a value"; declare "${1#--}=$2"; given[${1#--}]=1; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    *) die "unknown word $1; try --help" ;;
  esac
done
[ ${#stages[@]} -gt 0 ] || { usage; exit 2; }
case $device in cuda | cpu) ;; *) die "--device must be cuda or cpu, got $device" ;; esac
[[ $seconds =~ ^([1-9][0-9]{0,5})?$ ]] || die "--seconds must be a whole number above 0, got $seconds"
# Given folders, from where the command was called; the defaults lie in the project.
for option in out packed build scratch; do
  case ${!option} in '' | /*) ;; *) [ -z "${given[$option]:-}" ] || declare "$option=$called_from/${!option}" ;; esac
done
mkdir -p "$out" 2>/dev/null && [ -w "$out" ] || die "--out $out: cannot write there"
out=$(cd "$out" && pwd)
[ -z "$scratch" ] || [ -w "$scratch" ] || die "--scratch $scratch is no folder that can be written"
here=tests/bench/gpu
work=$(mktemp -d "${TMPDIR:-/tmp}/moegraft-gpu-XXXXXX") scratch_of_stage=''
trap 'rm -rf "$work" ${scratch_of_stage:+"$scratch_of_stage"}' EXIT
trap 'interrupted 130' INT
trap 'interrupted 143' TERM HUP
programs="test_kernels test_model test_distributed test_parallel test_train"

choose_python() {
  local one candidates=("${MOEGRAFT_VENV:-.venv}/bin/python" python3)
  [ -z "${MOEGRAFT_PYTHON:-}" ] || candidates=("$MOEGRAFT_PYTHON")
  for one in "${candidates[@]}"; do
    "$one" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null && { command -v "$one"; return; }
  done
  return 1
}
has_modules() { "$python" -c 'import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, sys.argv[1:])))' "$@"; }

. tools/gpu_bringup/run.sh
. tools/gpu_bringup/pack.sh
. tools/gpu_bringup/stages.sh

report() {
  command -v python3 >/dev/null || die "report needs python3, which is not here; it can be run later, wherever $out is"
  python3 "$here/report.py" "$out" || code=1
}

code=0
for stage in "${stages[@]}"; do
  case $stage in
    pack) pack ;;
    report) report ;;
    dry-run) device=cpu packed=$out/packed build=${build:-build}
      pack
      for stage in tests micro step; do run_stage "$stage"; done
      report ;;
    *) run_stage "$stage" ;;
  esac
done
[ -z "$only" ] || [ -n "$matched" ] || die "--only $only: no such part in ${stages[*]}"
exit $code
