# gpu_bringup: how a stage and its parts run. A part that fails is written down and the stage goes on; `code` is 1 at the end.

# Where our programs find their libraries: the packed ones, then torch's. Python gets none of it.
prepare() {
  python=$(choose_python) || die "$([ -n "${MOEGRAFT_PYTHON:-}" ] && echo "MOEGRAFT_PYTHON=$MOEGRAFT_PYTHON is no Python that has torch" || echo "no Python here has torch"): set MOEGRAFT_PYTHON to one that has torch 2.11 for CUDA 13"
  python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
  [ -e "$packed/packed.tar.gz" ] || die "no $packed/packed.tar.gz: run tools/gpu_bringup.sh pack where the project can be built, and bring $packed along"
  tree=$work/packed
  if [ ! -e "$tree" ]; then
    mkdir -p "$tree"
    tar xzf "$packed/packed.tar.gz" -C "$tree" 2>/dev/null && [ -s "$tree/glibc" ] && [ -s "$tree/commit" ] && [ -x "$tree/bin/moegraft" ] ||
      die "$packed/packed.tar.gz is damaged or none of ours: run tools/gpu_bringup.sh pack again"
  fi
  local torch libraries missing needed have
  torch=$("$python" -c 'import importlib.util; print(importlib.util.find_spec("torch").submodule_search_locations[0])')
  libraries=$tree/lib:$torch/lib:$(ls -d "$torch"/../nvidia/*/lib 2>/dev/null | paste -sd:)
  needed=$(cat "$tree/glibc") have=$(getconf GNU_LIBC_VERSION | cut -d' ' -f2)
  [ "$(printf '%s\n' "$needed" "$have" | sort -V | tail -n 1)" = "$have" ] || die "the packed programs need glibc $needed, this system has $have: take an image with a newer one"
  missing=$(for file in "$tree"/bin/*; do LD_LIBRARY_PATH=$libraries ldd "$file" 2>&1 | grep 'not found' || true; done | sort -u)
  [ -z "$missing" ] || die "libraries are missing here: $missing"
  # One-line programs that set the path for themselves alone, for Python's children and timeout's.
  wrapped=$work/programs
  mkdir -p "$wrapped"
  for file in "$tree"/bin/*; do
    printf '#!/bin/sh\nLD_LIBRARY_PATH="%s" exec "%s" "$@"\n' "$libraries" "$file" >"$wrapped/$(basename "$file")"
    chmod +x "$wrapped/$(basename "$file")"
  done
  moegraft=$wrapped/moegraft
  export MOEGRAFT_BIN=$moegraft MOEGRAFT_SOURCE_DIR=$root MOEGRAFT_BINARY_DIR=$tree OMP_WAIT_POLICY=PASSIVE MKL_CBWR=AUTO HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
  export PYTORCH_ALLOC_CONF=expandable_segments:True
  on_card || export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1  # tiny sizes: on a busy machine more threads only wait for each other
}

# Models in memory where there is room: containers often have 64 MiB there.
choose_scratch() {
  if [ "$device" = cuda ] && [ -w /dev/shm ] && [ "$(df -Pm /dev/shm | awk 'NR == 2 {print $4}')" -ge 40960 ]; then echo /dev/shm; else echo "$work"; fi
}

run_stage() {
  local limit
  case $1 in tests) limit=420 ;; micro) limit=400 ;; step) limit=560 ;; esac
  on_card || limit=$((2 * limit))
  stage=$1 results=$out/$1
  prepare
  if on_card && ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
    echo "gpu_bringup: $stage needs a GPU, and nvidia-smi shows none here; --device cpu tries the script in tiny sizes" >&2
    code=1
    return
  fi
  scratch_of_stage=$(mktemp -d "${scratch:-$(choose_scratch)}/moegraft-$stage-XXXXXX")
  # What an earlier call measured must not stand beside this one's figures. With --only parts that run again replace themselves.
  if [ -z "$only" ] && [ -d "$results" ]; then rm -rf "$results.before"; mv "$results" "$results.before"; fi
  mkdir -p "$results"
  deadline=$((SECONDS + ${seconds:-$limit}))
  echo "== $stage on $device, at most ${seconds:-$limit} s, into $results"
  "stage_$stage"
  rm -rf "$scratch_of_stage"
}

# Ends the part that runs, with all that it started, writes it down and leaves.
running='' part_name='' watcher='' matched=''
interrupted() {
  trap '' INT TERM HUP
  if [ -n "$running" ]; then
    kill -TERM "$running" 2>/dev/null || true
    wait "$running" 2>/dev/null || true
    [ -z "$watcher" ] || kill "$watcher" 2>/dev/null || true
    note "$part_name" interrupted 0 "$1" "the script was ended"
  fi
  exit "$1"
}

# note PART STATUS SECONDS CODE REASON
note() {
  printf '{"stage": "%s", "part": "%s", "status": "%s", "seconds": %s, "code": %s, "reason": "%s", "device": "%s", "commit": "%s"}\n' "$stage" "$1" "$2" "$3" "$4" "${5//[\"\\]/}" "$device" "$(cat "$tree/commit")" >>"$results/parts.jsonl"
  printf '   %-28s %-8s %4s s  %s\n' "$1" "$2" "$3" "$5"
}
# after FILE PART NAME: whether NAME can run, for which PART had to leave FILE.
after() { [ -e "$1" ] || { skip "$3" "needs $2, which left nothing${only:+: name it in --only too}"; return 1; }; }
on_card() { [ "$device" = cuda ]; }
skip() { wanted "$1" && note "$1" skipped 0 0 "$2"; true; }
wanted() {
  [ -z "$only" ] || case ",$only," in *",$1,"*) ;; *) return 1 ;; esac
  matched=1
}

# part NAME LIMIT FILE COMMAND…: what it prints goes to FILE ("-": into the log, NAME.log, where everything else is).
part() {
  local name=$1 limit=$2 file=$3 begin=$SECONDS left=$((deadline - SECONDS)) result=0 log
  shift 3
  wanted "$name" || return 0
  on_card || limit=$((8 * limit))  # limits are for a card; a CPU may have other work
  [ "$left" -ge 5 ] || { note "$name" skipped 0 0 "no time left in this stage"; return 0; }
  [ "$limit" -le "$left" ] || limit=$left
  log=$results/$name.log
  echo "\$ $*" >"$log"
  [ "$file" = - ] && file=$log || file=$results/$file
  watcher=''
  if [ "$device" = cuda ] && [ "$stage" != tests ] && command -v nvidia-smi >/dev/null; then
    nvidia-smi dmon -s puc -o T >"$results/$name.dmon" 2>&1 &
    watcher=$!
  fi
  # In the background, where a signal to this script need not wait for its end.
  if [ "$file" = "$log" ]; then timeout -k 10 "$limit" "$@" >>"$log" 2>&1 &
  else timeout -k 10 "$limit" "$@" >"$file" 2>>"$log" & fi
  running=$! part_name=$name
  wait "$running" || result=$?
  running=''
  [ -z "$watcher" ] || kill "$watcher" 2>/dev/null || true
  case $result in
    0) note "$name" ok $((SECONDS - begin)) 0 '' ;;
    124 | 137) note "$name" timeout $((SECONDS - begin)) $result "ended after $limit s; see $name.log"; code=1 ;;
    *) note "$name" failed $((SECONDS - begin)) $result "$(tail -n 1 "$log" | tr -d '\t\r' | cut -c1-160)"; code=1 ;;
  esac
}
