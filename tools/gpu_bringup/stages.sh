# gpu_bringup: what each stage runs, in the order in which a failure tells most. Sizes: Qwen3-30B-A3B's on a card, tiny on a CPU.

gpu_tests='*Cuda*:*Nccl*:*Pinned*-*OnTheHost*'

# What a host cannot run and what a tool is missing for, with the reason.
unless_possible() {
  on_card || { skip "$1" "on a CPU there is nothing to look at"; return 0; }
  command -v "$2" >/dev/null || { skip "$1" "$2 is not here"; return 0; }
  return 1
}

# suite PART PROGRAM LIMIT [FILTER]: the cases that need a card; without one they skip, and say so in the XML.
suite() {
  # shellcheck disable=SC2046
  [ -x "$wrapped/$2" ] || { skip "$1" "$2 is not packed"; return 0; }
  part "$1" "$3" - env $(on_card && echo MOEGRAFT_REQUIRE_GPU=1) "$wrapped/$2" --gtest_filter="${4:-$gpu_tests}" --gtest_output="xml:$results/$1.xml"
}

stage_tests() {
  local tool
  part probe 60 probe.json "$python" "$here/probe.py" --device "$device"
  suite kernels test_kernels 100
  suite model test_model 90
  suite train test_train 150
  suite collectives test_distributed 60
  suite parallel test_parallel 60
  # A small graft by the commands that a user has: killed, resumed, text drift, and the same losses on the CPU.
  if has_modules safetensors; then
    part graft-model 60 graft-model.json "$python" "$here/make_model.py" "$here/tiny.json" "$scratch_of_stage/base" --device cpu
    after "$scratch_of_stage/base/config.json" graft-model graft-world && part graft-world 90 - "$python" "$here/make_world.py" "$moegraft" "$scratch_of_stage/base" "$scratch_of_stage/world" --pictures "$(on_card && echo 96 || echo 12)" --size 24 --codec-steps 10 \
      --sequence-length 128 --tokens-per-step "$(on_card && echo 1024 || echo 256)"
    after "$scratch_of_stage/world/graft.yaml" graft-world graft && part graft 120 graft.json "$python" "$here/train.py" "$moegraft" "$scratch_of_stage/world/graft.yaml" "$scratch_of_stage/runs" --device "$device" --steps "$(on_card && echo 100 || echo 12)" --beside cpu \
      --set 'adapters[0].init=gw_subspace' --set ot.calibration_tokens=1024
  else
    skip graft "this Python has no safetensors"
  fi
  # Small cases: a sanitizer makes them tens of times slower.
  for tool in memcheck racecheck synccheck initcheck; do
    unless_possible "$tool" compute-sanitizer || part "$tool" 60 - compute-sanitizer --tool "$tool" --error-exitcode 3 --log-file "$results/$tool.txt" --target-processes all "$wrapped/test_kernels" --gtest_filter='*Cuda*-*ThirtyBillion*:*Experts*:*Flash*:*OnTheHost*'
  done
  unless_possible memory-kernels ncu || part memory-kernels 90 memory-kernels.csv ncu --clock-control none --csv --metrics gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed --target-processes all \
    "$moegraft" bench ops --only dispatch,norm,rotary,residual --rounds 1 --dtype bfloat16 --device cuda $(shape 4096)
}

# Options of `bench ops`.
shape() {
  if on_card; then echo "--tokens $1 --seq 4096 --hidden 2048 --width 768 --experts 128 --top-k 8 --heads 32 --kv-heads 4 --head-dim 128 --vocab 151936 --rank 16"
  else echo "--tokens 64 --seq 32 --hidden 64 --width 32 --experts 8 --top-k 2 --heads 4 --kv-heads 2 --head-dim 16 --vocab 512 --rank 4 --rounds 1 --matmul 256"; fi
}

stage_micro() {
  local small tokens
  on_card && small='' || small='--hidden 64 --width 32 --experts 8 --top-k 2 --rank 8'
  on_card && tokens=4096,8192,16384 || tokens=64
  # shellcheck disable=SC2046,SC2086
  {
    part attention 60 attention.json "$python" "$here/micro.py" attention --device "$device" $(on_card || echo --tokens 64 --heads 4 --kv-heads 2 --head-dim 16)
    part ops 100 ops.json "$moegraft" bench ops --dtype bfloat16 --device "$device" --json $(shape 4096)
    # cuDNN's attention beside the default, in a build that has it (`moegraft inspect` says).
    if on_card; then part ops-cudnn 60 ops-cudnn.json "$moegraft" --attention cudnn bench ops --only attention --dtype bfloat16 --device "$device" --json $(shape 4096)
    else skip ops-cudnn "on a CPU there is no cuDNN"; fi
    part ops-16k 100 ops-16k.json "$moegraft" bench ops --only moe,loss,linear --dtype bfloat16 --device "$device" --json $(shape 16384)
    part grouped 90 grouped.json "$python" "$here/micro.py" grouped --device "$device" --tokens $tokens $small
  }
  # transformers + PEFT beside us on one card, one checkpoint, the same ids: a cut of four layers.
  if ! has_modules transformers peft safetensors; then
    skip peer "this Python lacks transformers, peft or safetensors"
    return 0
  fi
  local batch seq cut=$scratch_of_stage/cut
  on_card && batch=1 seq=4096 || batch=2 seq=32
  part peer-model 60 peer-model.json "$python" "$here/make_model.py" "$(config)" "$cut" --layers "$(on_card && echo 4 || echo 2)" --device "$device"
  after "$cut/config.json" peer-model peer || return 0
  part peer-ours 60 peer-ours.json "$moegraft" bench step "$cut" --dtype bfloat16 --device "$device" --rank 16 --batch $batch --seq $seq --steps 5 --json --matmul "$(on_card && echo 0 || echo 256)"
  part peer 90 peer.json "$python" tests/bench/peer_step.py "$cut" --dtype bfloat16 --device "$device" --rank 16 --batch $batch --seq $seq --steps "$(on_card && echo 5 || echo 2)" --experts grouped_mm
}

config() { on_card && echo "$here/qwen3-30b-a3b.json" || echo "$here/tiny.json"; }

# step_of PART STEPS OPTIONS…: a whole step on random weights, drawn on the device from a config.json.
step_of() {
  local name=$1 steps=$2
  shift 2
  on_card || steps=2
  part "$name" 75 "$name.json" "$moegraft" bench step --random "$(config)" --dtype bfloat16 --device "$device" --rank 16 --steps "$steps" --json --matmul "$(on_card && echo 0 || echo 256)" "$@"
}

stage_step() {
  local s=4096 gib=0 recompute='' moments='' layers=48
  if on_card; then
    gib=$(($(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1) / 1024))
    # Beside 61 GB of weights an 80 GB card holds neither float32 moments nor the activations of 48 layers.
    [ "$gib" -ge 100 ] || recompute='--recompute 48' moments='--optimizer adamw_8bit'
  else
    s=32 layers=2
  fi
  # shellcheck disable=SC2086
  {
    step_of one-4k 6 --batch 1 --seq $s $moments $recompute
    step_of two-4k 6 --batch 2 --seq $s $moments $recompute
    step_of as-trained 3 --batch 2 --seq $s $recompute --optimizer adamw_8bit --accumulate "$(on_card && echo 8 || echo 2)" --routing --clip 1
    step_of no-adapters 6 --batch 2 --seq $s $recompute --gate none --codes 64
    step_of kernels 3 --batch 2 --seq $s $moments $recompute --kernels
    step_of four-4k 4 --batch 4 --seq $s $moments $recompute
    step_of eight-bit 4 --batch 2 --seq $s --optimizer adamw_8bit --recompute $layers
    step_of cut-4 6 --batch 2 --seq $s --layers "$(on_card && echo 4 || echo 1)"
    step_of cut-12 6 --batch 2 --seq $s --layers "$(on_card && echo 12 || echo 2)"
  }
  # Decoding, as it comes and recorded.
  decode plain
  if on_card; then decode recorded --cuda-graphs; else skip decode-recorded "a CPU records no graphs"; fi
  # A real training of a cut: prefetched batches, statistics, checkpoints in the background, SIGKILL, text drift.
  if ! has_modules safetensors; then
    skip train "this Python has no safetensors"
    return 0
  fi
  on_card && layers=8 || layers=2
  part train-model 60 train-model.json "$python" "$here/make_model.py" "$(config)" "$scratch_of_stage/base" --layers $layers --device "$device"
  after "$scratch_of_stage/base/config.json" train-model train || return 0
  part train-world 60 - "$python" "$here/make_world.py" "$moegraft" "$scratch_of_stage/base" "$scratch_of_stage/world" --pictures "$(on_card && echo 96 || echo 12)" --size "$(on_card && echo 48 || echo 24)" \
    --codec-steps 10 --sequence-length "$(on_card && echo 4096 || echo 128)" --tokens-per-step "$(on_card && echo 16384 || echo 256)" --accumulation 2
  after "$scratch_of_stage/world/graft.yaml" train-world train || return 0
  part train 150 train.json "$python" "$here/train.py" "$moegraft" "$scratch_of_stage/world/graft.yaml" "$scratch_of_stage/runs" --device "$device" --steps "$(on_card && echo 20 || echo 12)" \
    --set train.optimizer=adamw_8bit --set train.gradients=bf16  # what the 30B recipe needs on 80 GB
}

decode() {
  local name=decode-$1
  shift
  # shellcheck disable=SC2046
  part "$name" 60 "$name.json" "$moegraft" bench generate --random "$(config)" --dtype bfloat16 --device "$device" --json --rounds 1 "$@" \
    $(on_card && echo --layers 12 --batch 8 --prompt 512 --tokens 64 --pictures 8 || echo --batch 2 --prompt 8 --tokens 4 --pictures 2 --codes 16)
}
