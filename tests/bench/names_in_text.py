"""Manifests that ask for well-known pictures by their names beside 0, 1, 2, 4 or 8 words of running text, and the retrieval section that measures them.

    python tests/bench/names_in_text.py data/quickstart runs/x/names-in-text          # <data> of a recipe, <folder to write>
    moegraft eval runs/x/graft -c runs/x/names-in-text/eval.yaml -o runs/x/names-in-text.json
"""
import json
import pathlib
import random
import sys

data, out = (pathlib.Path(p).resolve() for p in sys.argv[1:3])
out.mkdir(parents=True, exist_ok=True)
names = [json.loads(line) for line in (data / "emoji/popular.jsonl").open()]
glosses = [line.split(": ", 1)[1].split() for line in (data / "corpus/eval.txt").read_text().splitlines() if ": " in line]  # text that no caption was made of
draw = random.Random(99)
sections = ["retrieval:"]
for beside in (0, 1, 2, 4, 8):
    lines = []
    for entry in names:
        text = draw.choice([gloss for gloss in glosses if len(gloss) >= beside])
        first, place = draw.randint(0, len(text) - beside), draw.randint(0, beside)
        words = text[first : first + beside]
        caption = " ".join(words[:place] + [entry["text"]] + words[place:])
        lines.append(json.dumps({"image": str(data / "emoji" / entry["image"]), "text": caption}) + "\n")
    path = out / f"beside_{beside}.jsonl"
    path.write_text("".join(lines))
    sections.append(f"  - {{ name: beside_{beside}, manifest: {path}, candidates: {data / 'emoji/popular.jsonl'}, cfg: 1.5, n: {len(names)} }}")
(out / "eval.yaml").write_text("\n".join(sections) + f"\nbaselines: {{ manifest: {data / 'emoji/train.jsonl'} }}\n")
