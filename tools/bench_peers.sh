#!/usr/bin/env bash
# Measures moegraft beside transformers + PEFT on this machine: training steps and generation, both sides by turns on the same random checkpoints;
# with --only llama generation beside llama.cpp.
#
#   tools/bench_peers.sh [--quick] [--out DIR] [--rounds N] [--steps N] [--shapes fine32,fine64,mix8,odd48,smollm2,quickstart] [--dtypes float32,bfloat16]
#                        [--batches 4x512,1x128] [--only steps,implementations,generation,llama] [--isa avx2] [--device cuda] [--rank P] [--threads N]
#                        [--llama-python PYTHON]
#
# smollm2: SmolLM2-135M's sizes with its FFNs as experts; quickstart: the quickstart's graft step; odd48: 48 experts top-6 of odd sizes. --isa holds both
# sides to an instruction set (avx2, avx512, avx512_bf16). --quick: one shape, few steps. Leave the machine alone while it runs.
# Writes DIR/peers-<processor>[-<isa>][-llama].json and .md (default: tests/bench/results); a step or generation in one, llama.cpp in the other.
# Needs a build (MOEGRAFT_BUILD_DIR, default: build) and the peers' Python packages: tools/setup.sh --tests; for llama.cpp see tests/bench/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in -h | --help) sed -n '2,/^set -/p' "$0" | sed '$d;s/^# \{0,1\}//'; exit 0 ;; esac
binary=${MOEGRAFT_BUILD_DIR:-build}/moegraft
python=${MOEGRAFT_VENV:-.venv}/bin/python
[ -x "$binary" ] || { echo "bench_peers: no $binary: build first (cmake --preset cpu && cmake --build build)" >&2; exit 2; }
"$python" -c 'import torch, transformers, peft' 2>/dev/null || { echo "bench_peers: $python lacks torch, transformers or peft: tools/setup.sh --tests" >&2; exit 2; }
exec "$python" tests/bench/compare.py --binary "$binary" --python "$python" "$@"
