#!/usr/bin/env bash
# From a fresh machine to pictures drawn by a text model: set-up, build, and the whole job on real data.
#
#   tools/quickstart.sh [--recipe NAME] [--runs DIR]
#
#   --recipe NAME  configs/NAME: quickstart (default; minutes), emoji-long (an hour: more varied captions, a base that has read more),
#                  or smollm2 (a real pretrained model as base: SmolLM2-135M-Instruct; an hour on a CPU)
#   --runs DIR     where results go (default: runs/NAME); a repeated call continues where it stopped
#
# Ends with a contact sheet, a summary table and DIR/summary.json.
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=quickstart runs=
while [ $# -gt 0 ]; do
  case $1 in
    --recipe) recipe=${2:?--recipe needs a name}; shift 2 ;;
    --runs) runs=${2:?--runs needs a folder}; shift 2 ;;
    -h | --help) sed -n '2,/^set -/p' "$0" | sed '$d;s/^# \{0,1\}//'; exit 0 ;;
    *) echo "quickstart: unknown option $1 (try --help)" >&2; exit 2 ;;
  esac
done
[ -d "configs/$recipe" ] || { echo "quickstart: no recipe configs/$recipe" >&2; exit 2; }
runs=${runs:-runs/$recipe}
build=${MOEGRAFT_BUILD_DIR:-build}
mkdir -p "$runs"

# stage NAME COMMAND…: runs a stage once; a finished one is skipped when the script is called again. Seconds go to stages.tsv.
stage() {
  local name=$1 start=$SECONDS
  shift
  case $name in
    setup | build) ;;  # quick when nothing changed
    *) if [ -e "$runs/.done-$name" ]; then echo "== $name: done before"; return; fi ;;
  esac
  echo "== $name"
  local code=0
  set +e  # a stage in an `if` or before `||` would go on after a command of its own that failed
  (set -e; "$@")
  code=$?
  set -e
  [ "$code" = 0 ] || { echo "quickstart: stage '$name' failed (exit $code); repeat the command to continue from here" >&2; exit 1; }
  [ -e "$runs/.done-$name" ] || printf '%s\t%s\n' "$name" "$((SECONDS - start))" >>"$runs/stages.tsv"
  touch "$runs/.done-$name"
  echo "== $name: $((SECONDS - start)) s"
}
build_binary() {
  cmake --preset cpu -B "$build" -DMOEGRAFT_BUILD_TESTS=OFF >"$runs/configure.log" || { cat "$runs/configure.log"; return 1; }
  cmake --build "$build" --target moegraft
}

data=data/$recipe models=models/$recipe configs=configs/$recipe graft=$runs/graft
moegraft=$build/moegraft
. tools/quickstart_smollm2.sh
prepare_data() {
  local more=()
  "$moegraft" data prepare corpus -o "$data/corpus"
  [ "$recipe" = emoji-long ] && more=(--running-text "$data/corpus/train.txt")
  "$moegraft" data prepare emoji -o "$data/emoji" --size 36 --popular 600 --synonyms configs/emoji_synonyms.tsv "${more[@]}"
}
train_tokenizer() {
  "$moegraft" tokenize train --text "$data/corpus/train.txt" --vocab-size 2048 --type bpe -o "$models/tokenizer"
}
shard_text() {
  for part in train eval; do "$moegraft" data prepare text "$data/corpus/$part.txt" --tokenizer "$models/tokenizer" -o "$data/text/$part" --overwrite; done
}
train_base() { "$moegraft" train -c "$configs/base.yaml" --set "run.dir=$runs/base" --resume auto; }
train_codec() {
  "$moegraft" codec train -c "$configs/codec.yaml" --resume auto --overwrite  # goes on where it stopped; an older codec of other pictures or sizes is replaced
  "$moegraft" codec eval "$models/codec" --images "$data/emoji/heldout.jsonl" --sheet "$runs/codec.png" --json >"$runs/codec.json"
}
shard_images() {
  local part captions
  for part in popular heldout compositions train; do
    captions=text
    [ "$part" = train ] && captions=all
    "$moegraft" data prepare shards --manifest "$data/emoji/$part.jsonl" --captions "$captions" --tokenizer "$models/tokenizer" --codec "$models/codec" -o "$data/images/$part" --overwrite
  done
}
train_graft() {
  "$moegraft" train -c "$configs/graft.yaml" --set "run.dir=$graft" --set "model.path=$runs/base/model" --resume auto
}
draw() {
  mkdir -p "$runs/pictures"
  "$moegraft" generate "$graft" --prompts "$configs/prompts.txt" --n 1 --temperature 0 --cfg 1.5 --image "$runs/pictures/sheet.png" --seed 17
  cp "$runs/pictures/sheet.png" "$runs/sheet.png"
}
# The same short run from each initialisation of the new rows; `moegraft summary` compares the NLL of what it trains on and of compositions that it never sees (one seed; a study needs more).
compare_initialisations() {
  local init
  for init in random moment_match gw_barycentric; do
    "$moegraft" train -c "$configs/graft.yaml" --set "run.dir=$runs/inits/$init" --set "model.path=$runs/base/model" --set "embeddings.init=$init" --set train.steps=150 \
      --set train.sample_every=0 --set 'train.sample_prompts=[]' --set train.eval_every=150 --set train.log_every=50 --set checkpoint.every=150 --resume auto
  done
}
evaluate() {
  "$moegraft" inspect "$graft" --json >"$runs/inspect.json"
  "$moegraft" eval "$graft" -c "$configs/eval.yaml" -o "$runs/eval.json"  # goes on where it stopped
}
export_adapter() { "$moegraft" export "$graft" --format peft -o "$runs/peft" --overwrite --json >"$runs/export.json"; }

begin=$SECONDS
stage setup bash tools/setup.sh --runtime
stage build build_binary
if [ "$recipe" = smollm2 ]; then
  smollm2_stages
  exit
fi
stage data prepare_data
stage tokenizer train_tokenizer
stage text-shards shard_text
stage base train_base
stage codec train_codec
stage image-shards shard_images
stage graft train_graft
stage initialisations compare_initialisations
stage draw draw
stage evaluate evaluate
stage export export_adapter
stage real-base real_base
"$moegraft" summary "$runs"
echo "quickstart: finished in $((SECONDS - begin)) s; pictures in $runs/sheet.png"
