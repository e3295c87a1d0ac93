#!/usr/bin/env bash
# Measures several processes on this machine: step times of data, expert and sharded layouts with 1, 2 and 4 processes, their exchanges, the stall of
# checkpoints, and how well `moegraft inspect --plan` foresees the step times.
#
#   tools/bench_scaling.sh [--quick] [--out DIR] [--models DIR] [--scratch DIR] [--shape fine32] [--dtype bfloat16] [--processes 1,2,4] [--batch 8] [--seq 512] [--steps 6] [--rounds 3]
#
# Writes DIR/scaling-<processor>.json and .md (default: tests/bench/results). --quick: short sequences, one round. Leave the machine alone while it runs.
# Needs a build (MOEGRAFT_BUILD_DIR, default: build) and, to make the random checkpoint, the tests' Python packages: tools/setup.sh --tests.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in -h | --help) sed -n '2,/^set -/p' "$0" | sed '$d;s/^# \{0,1\}//'; exit 0 ;; esac
binary=${MOEGRAFT_BUILD_DIR:-build}/moegraft
python=${MOEGRAFT_VENV:-.venv}/bin/python
[ -x "$binary" ] || { echo "bench_scaling: no $binary: build first (cmake --preset cpu && cmake --build build)" >&2; exit 2; }
[ -x "$python" ] || python=python3
MOEGRAFT_BENCH_BINARY=$binary MOEGRAFT_BENCH_PYTHON=$python exec "$python" tests/bench/scaling.py "$@"
