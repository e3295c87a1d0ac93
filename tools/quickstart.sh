#!/usr/bin/env bash
# From a fresh machine to pictures drawn by a text model: set-up, build, and the whole job on real data.
#
#   tools/quickstart.sh [--runs DIR]
#
#   --runs DIR   where results go (default: runs/quickstart); a repeated call continues where it stopped
#
# Ends with a contact sheet, a summary table and DIR/summary.json.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=runs/quickstart
while [ $# -gt 0 ]; do
  case $1 in
    --runs) runs=${2:?--runs needs a folder}; shift 2 ;;
    -h | --help) sed -n '2,/^set -/p' "$0" | sed '$d;s/^# \{0,1\}//'; exit 0 ;;
    *) echo "quickstart: unknown option $1 (try --help)" >&2; exit 2 ;;
  esac
done
build=${MOEGRAFT_BUILD_DIR:-build}
export OMP_WAIT_POLICY=PASSIVE
mkdir -p "$runs"

# stage NAME COMMAND…: runs a stage once; a finished one is skipped when the script is called again. Seconds go to stages.tsv.
stage() {
  local name=$1 start=$SECONDS
  shift
  if [ -e "$runs/.done-$name" ]; then
    echo "== $name: done before"
    return
  fi
  echo "== $name"
  "$@" || { echo "quickstart: stage '$name' failed (exit $?); repeat the command to continue from here" >&2; exit 1; }
  printf '%s\t%s\n' "$name" "$((SECONDS - start))" >>"$runs/stages.tsv"
  touch "$runs/.done-$name"
  echo "== $name: $((SECONDS - start)) s"
}
build_binary() {
  cmake --preset cpu -B "$build" -DMOEGRAFT_BUILD_TESTS=OFF >"$runs/configure.log" || { cat "$runs/configure.log"; return 1; }
  cmake --build "$build" --target moegraft
}

begin=$SECONDS
bash tools/setup.sh --runtime
build_binary
echo "quickstart: finished in $((SECONDS - begin)) s"
