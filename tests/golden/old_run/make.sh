#!/usr/bin/env bash
# Makes this folder with a moegraft of an earlier commit, so that tests know whether what it wrote still loads (tests/train/old_run_test.cpp):
#   git worktree add /tmp/old 69599a1 && cmake --preset cpu -S /tmp/old && ninja -C /tmp/old/build moegraft
#   tests/golden/old_run/make.sh /tmp/old/build/moegraft
# A base of 2 layers, 4 experts and width 16, a codec of 2 x 2 codes, a graft of 6 steps whose checkpoints of steps 4 and 6 are kept. Everything that a run needs is here;
# run/config.yaml names it below @WORLD@. expected/ is what that moegraft made of the run: losses, and logits of text and of an image.
set -euo pipefail
moegraft=$(realpath "$1") here=$(cd "$(dirname "$0")" && pwd)
export OMP_NUM_THREADS=2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 - <<'P'
import json, random, struct, zlib
def png(path, pixels):  # rows of (r, g, b)
    raw = b"".join(b"\0" + bytes(v for p in row for v in p) for row in pixels)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    with open(path, "wb") as f:
        f.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", len(pixels[0]), len(pixels), 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))
colours = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "yellow": (230, 210, 40)}
with open("pictures.jsonl", "w") as out:
    for name, colour in colours.items():
        for shape in ("square", "disc"):
            inside = lambda x, y: max(abs(x - 5.5), abs(y - 5.5)) < 4 if shape == "square" else (x - 5.5) ** 2 + (y - 5.5) ** 2 < 20
            png(f"{name}-{shape}.png", [[colour if inside(x, y) else (245, 245, 245) for x in range(12)] for y in range(12)])
            out.write(json.dumps({"image": f"{name}-{shape}.png", "text": f"a {name} {shape}"}) + "\n")
random.seed(1)
nouns, verbs = "cat dog bird fish tree house river stone".split(), "sees likes finds follows".split()
with open("text.txt", "w") as out:
    for _ in range(60): out.write(f"the {random.choice(list(colours))} {random.choice(nouns)} {random.choice(verbs)} the {random.choice(list(colours))} {random.choice(nouns)}.\n\n")
P
"$moegraft" tokenize train --text text.txt --vocab-size 320 --type bpe -o tokenizer
"$moegraft" data prepare text text.txt --tokenizer tokenizer -o text
"$moegraft" train -c /dev/stdin <<Y
run: { dir: base-run, seed: 3 }
model: { init: { family: qwen3_moe, tokenizer: tokenizer, hidden_size: 16, num_layers: 2, num_heads: 2, num_kv_heads: 1, head_dim: 8, num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 16, max_positions: 64 } }
data: { train: [{ path: text }], packing: stream, sequence_length: 32, tokens_per_step: 256 }
train: { steps: 20, base_weights: full, base: { lr: 1.0e-2 }, log_every: 10 }
checkpoint: { every: 20, keep: 1 }
Y
cp -r base-run/model base
cat > codec.yaml <<Y
dir: codec
seed: 3
codec: { image_size: 12, patch: 3, channels: [8, 8], encoder_blocks: [0, 0], decoder_blocks: [0, 0], mixer_blocks: 0, mixer_width: 8, codebook_size: 16, code_width: 4 }
data: { train: [{ path: pictures.jsonl }], eval: pictures.jsonl }
train: { steps: 20, batch_size: 8 }
Y
"$moegraft" codec train -c codec.yaml
"$moegraft" data prepare shards --manifest pictures.jsonl --captions text --tokenizer tokenizer --codec codec -o images
cat > graft.yaml <<Y
run: { dir: run, seed: 5 }
model: { path: base }
modalities: { image: { codec: codec } }
adapters: [{ kind: modality_lora, modality: [image], rank: 2, alpha: 4, sites: [gate, up, down, q, v], init: gw_subspace }]
embeddings: { init: gw_barycentric }
ot: { clusters: 8, max_iterations: 10, calibration_tokens: 256 }
data: { train: [{ path: images }], sequence_length: 32, tokens_per_step: 128 }
train: { steps: 6, lora: { lr: 1.0e-2 }, embeddings: { lr: 1.0e-2 }, log_every: 1, precision: float32 }
checkpoint: { every: 4, keep: 2, keep_best: false }
routing: { every: 2 }
Y
"$moegraft" train -c graft.yaml
mkdir expected
python3 - <<'P'
import json, struct
for name, ids in {"text": [5, 17, 40, 99, 3, 8], "image": [5, 17, 320, 322, 330, 325, 323, 321]}.items():  # 320: begin, 321: end, codes from 322 on
    header = json.dumps({"input_ids": {"dtype": "I64", "shape": [1, len(ids)], "data_offsets": [0, 8 * len(ids)]}}).encode()
    open(f"expected/{name}-ids.safetensors", "wb").write(struct.pack("<Q", len(header)) + header + struct.pack(f"<{len(ids)}q", *ids))
P
"$moegraft" logits base --ids expected/text-ids.safetensors -o expected/text.safetensors
"$moegraft" logits run --ids expected/image-ids.safetensors -o expected/image.safetensors
"$moegraft" generate run --prompt 'a red disc' --temperature 0 --image picture.png --json > expected/generated.json
for part in base codec images text run expected; do rm -rf "$here/$part"; cp -r "$part" "$here/$part"; done
rm -rf "$here"/run/{tb,lock} "$here/codec/sheet.png"
grep -rlF "$work" "$here" | while read -r f; do sed -i "s#$work#@WORLD@#g" "$f"; done
