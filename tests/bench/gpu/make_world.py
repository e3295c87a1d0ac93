#!/usr/bin/env python3
"""Writes all that a graft trains on, with the binary's own commands and nothing from outside: text (this project's pages), a tokenizer, drawn pictures with
captions, a codec of a few steps, shards of both, and graft.yaml on a base that make_model.py wrote. Nothing here is worth learning: it has the sizes of it.

    make_world.py MOEGRAFT BASE OUT [--pictures 96] [--size 36] [--codec-steps 30] [--sequence-length 512] [--tokens-per-step 4096] [--accumulation 1]

Needs no Python package. The tokenizer is also copied into BASE.
"""
import argparse
import json
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
COLOURS = {"red": (214, 40, 40), "green": (40, 160, 70), "blue": (40, 80, 210), "black": (20, 20, 20), "orange": (240, 140, 20), "violet": (130, 60, 170), "grey": (120, 120, 120), "brown": (120, 80, 40)}
SHAPES = {
    "disc": lambda x, y: x * x + y * y < 0.6, "ring": lambda x, y: 0.3 < x * x + y * y < 0.7, "bar": lambda x, y: abs(y) < 0.3 and abs(x) < 0.8, "pole": lambda x, y: abs(x) < 0.3 and abs(y) < 0.8,
    "square": lambda x, y: max(abs(x), abs(y)) < 0.6, "frame": lambda x, y: 0.45 < max(abs(x), abs(y)) < 0.75, "cross": lambda x, y: min(abs(x), abs(y)) < 0.2 and max(abs(x), abs(y)) < 0.8,
    "saltire": lambda x, y: min(abs(x - y), abs(x + y)) < 0.25, "triangle": lambda x, y: abs(x) < (y + 0.8) / 2 and y < 0.7, "diamond": lambda x, y: abs(x) + abs(y) < 0.7,
    "half": lambda x, y: x * x + y * y < 0.6 and y > 0, "stairs": lambda x, y: int(4 * (x + 1)) > int(4 * (1 - y)),
}


def png(size, inside, colour):
    rows = bytearray()
    for j in range(size):
        rows.append(0)
        for i in range(size):
            rows += bytes(colour) if inside(2 * (i + 0.5) / size - 1, 2 * (j + 0.5) / size - 1) else b"\xff\xff\xff"
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(rows))) + chunk(b"IEND", b"")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("moegraft")
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    for name, value in dict(pictures=96, size=36, codec_steps=30, sequence_length=512, tokens_per_step=4096, accumulation=1).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    args = parser.parse_args()
    out = args.out.resolve()

    def moegraft(*words):
        r = subprocess.run([args.moegraft, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if r.returncode != 0:
            raise SystemExit(f"make_world: moegraft {' '.join(map(str, words))} ended with {r.returncode}: {r.stderr.strip()[-800:]}")

    (out / "pictures").mkdir(parents=True, exist_ok=True)
    lines = [line.strip() for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] for line in page.read_text().splitlines() if len(line.split()) > 4]
    (out / "text.txt").write_text("\n".join(lines) + "\n")
    rows = []
    for colour, rgb in COLOURS.items():
        for shape, inside in SHAPES.items():
            if len(rows) == args.pictures:
                break
            (out / "pictures" / f"{colour}-{shape}.png").write_bytes(png(args.size, inside, rgb))
            rows.append({"image": f"pictures/{colour}-{shape}.png", "text": f"a {colour} {shape}"})
    (out / "pictures.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    vocab = json.loads((args.base / "config.json").read_text())["vocab_size"]
    moegraft("tokenize", "train", "--text", out / "text.txt", "--vocab-size", min(vocab - 32, 2048), "--type", "bpe", "-o", out / "tokenizer")
    for file in (out / "tokenizer").iterdir():
        shutil.copy(file, args.base)
    (out / "codec.yaml").write_text(f"""dir: {out}/codec
seed: 17
codec: {{ image_size: {args.size}, patch: 3, channels: [16, 32], encoder_blocks: [1, 0], decoder_blocks: [1, 0], mixer_blocks: 1, mixer_width: 32, codebook_size: 64, code_width: 8 }}
data: {{ train: [{{ path: {out}/pictures.jsonl }}] }}
train: {{ steps: {args.codec_steps}, batch_size: 16 }}
""")
    moegraft("codec", "train", "-c", out / "codec.yaml", "--overwrite")
    moegraft("data", "prepare", "text", out / "text.txt", "--tokenizer", out / "tokenizer", "-o", out / "shards/text", "--overwrite")
    moegraft("data", "prepare", "shards", "--manifest", out / "pictures.jsonl", "--tokenizer", out / "tokenizer", "--codec", out / "codec", "-o", out / "shards/images", "--overwrite")
    (out / "graft.yaml").write_text(f"""run: {{ dir: {out}/run, seed: 17 }}
model: {{ path: {args.base.resolve()}, dtype: bfloat16 }}
modalities:
  image: {{ codec: {out}/codec }}
adapters:
  - {{ kind: modality_lora, modality: [image], rank: 16, alpha: 32, sites: [gate, up, down, q, k, v, o], init: kaiming_zero }}
embeddings: {{ init: moment_match }}
data:
  train:
    - {{ path: {out}/shards/images, weight: 0.9 }}
    - {{ path: {out}/shards/text, weight: 0.1 }}
  sequence_length: {args.sequence_length}
  tokens_per_step: {args.tokens_per_step}
train:
  steps: 20
  accumulation: {args.accumulation}
  lora: {{ lr: 1.0e-3 }}
  embeddings: {{ lr: 1.0e-2 }}
  warmup: 2
  clip: 1.0
  log_every: 1
checkpoint: {{ every: 10, keep: 2 }}
routing: {{ every: 10 }}
""")
    print(out / "graft.yaml", file=sys.stderr)


if __name__ == "__main__":
    main()
