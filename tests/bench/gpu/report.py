#!/usr/bin/env python3
"""Turns what tools/gpu_bringup.sh wrote into Markdown, on stdout and into OUT/report.md. Whatever is missing is said to be missing.

    report.py OUT

Needs no Python package.
"""
import json
import re
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

TARGETS = "≥ 15 k tokens/s on an H200 (LoRA r16 on all experts, bf16), ≤ 72 GB with 8-bit moments, adapters ≤ 15 %, PEFT's layer < 2.56 ms and < 1.30 GB"


class Results:
    def __init__(self, out):
        self.out = out

    def json(self, name):
        """OUT/name, an empty dict where it is missing or broken."""
        try:
            lines = (self.out / name).read_text().strip().splitlines()
            value = json.loads(lines[-1]) if lines else {}
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def parts(self):
        """The last account of every part, in order."""
        found = {}
        for stage in ("tests", "micro", "step"):
            file = self.out / stage / "parts.jsonl"
            for line in file.read_text(errors="replace").splitlines() if file.is_file() else []:
                try:
                    p = json.loads(line)
                    found[p["stage"], p["part"]] = {key: p[key] for key in ("stage", "part", "status", "seconds", "reason", "device", "commit")}
                except (ValueError, KeyError, TypeError):
                    continue
        return list(found.values())


def table(header, rows):
    line = lambda cells: "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"
    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)]) if rows else "Nothing."


def number(value, digits=1):
    return "not measured" if value is None else f"{value:,.{digits}f}".replace(",", " ")


def gib(mib):
    return None if mib is None else mib * 2**20 / 1e9


def share(value):
    return "not measured" if value is None else f"{100 * value:.1f} %"


def hardware(r, parts):
    probe, steps = r.json("tests/probe.json"), [r.json(f"step/{n}.json") for n in STEPS]
    card = next((j["card"] for j in steps if j.get("card")), None)
    lines = [f"Commit {parts[0]['commit'] if parts else 'unknown'}, on {parts[0]['device'] if parts else 'nothing'}."]
    if probe:
        lines.append(f"{probe.get('name')}, torch {probe.get('torch')}, {probe.get('system')}: copies {number(probe.get('copy_gb_per_s'), 0)} GB/s, bf16 products of {probe.get('matmul_size')} reach "
                     f"{number(probe.get('matmul_tflops'), 2)} TFLOP/s. These two are the ceilings.")
    if card:
        lines.append("Right after a step: " + ", ".join(f"{k} {v}" for k, v in card.items()) + ".")
    if parts and parts[0]["device"] == "cpu":
        lines.append("**A dry run on a CPU in tiny sizes: it shows that the script runs, and no figure means anything.**")
    return "\n\n".join(lines)


def tests(r):
    rows, failures = [], []
    for file in sorted((r.out / "tests").glob("*.xml")):
        try:
            root = xml.parse(file).getroot()
        except xml.ParseError:
            rows.append([file.stem, "its XML is cut off", "", "", ""])
            continue
        cases = list(root.iter("testcase"))
        failed = [c for c in cases if c.find("failure") is not None]
        skipped = [c for c in cases if c.find("skipped") is not None or c.get("result") == "skipped"]
        rows.append([file.stem, len(cases) - len(failed) - len(skipped), len(failed), len(skipped), number(float(root.get("time", 0)), 1)])
        for c in failed:
            failures.append(f"- {c.get('classname')}.{c.get('name')}: {(c.find('failure').get('message') or '').splitlines()[0][:200] if c.find('failure').get('message') else ''}")
    text = table(["suite", "passed", "failed", "skipped", "seconds"], rows)
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        file = r.out / "tests" / f"{tool}.txt"
        found = re.findall(r"ERROR SUMMARY: .*|RACECHECK SUMMARY: .*", file.read_text(errors="replace")) if file.exists() else []
        if found:
            failures.append(f"- {tool}: {found[-1]}")
    return text + ("\n\n" + "\n".join(failures) if failures else "")


STEPS = {"one-4k": "1 sequence", "two-4k": "2 sequences", "four-4k": "4 sequences", "as-trained": "2 sequences, accumulated, 8-bit moments, clipping, routing statistics", "eight-bit": "2 sequences, 8-bit moments, every layer recomputed",
         "no-adapters": "2 sequences, no adapters: the frozen base with activation gradients", "kernels": "2 sequences, then one more recorded", "cut-4": "a cut of few layers", "cut-12": "a cut of more layers"}


def steps(r):
    rows, found = [], {}
    for name, what in STEPS.items():
        j = found[name] = r.json(f"step/{name}.json")
        try:
            if not j:
                raise KeyError
            rows.append([what, j["layers"], f"{j['sequences']} × {j['seq']}", j["optimizer"], j["recompute_layers"], number(j["tokens_per_s"], 0), number(1e3 * j["median_step_s"], 1), number(gib(j["peak_mib"]), 2),
                         number(gib(j.get("reserved_mib")), 2), number(gib(j.get("card_used_mib")), 2), share(j["share_of_limit"])])
        except (KeyError, TypeError, ValueError, AttributeError):
            rows.append([what, *["not measured" if not j else f"not readable: step/{name}.json"] * 10])
            found[name] = {}
    text = table(["step", "layers", "tokens", "optimizer", "recomputed layers", "tokens/s", "median ms", "peak GB (tensors)", "reserved GB", "card GB", "of the matmul limit"], rows)
    lines = []
    with_, without = found["two-4k"], found["no-adapters"]
    if with_ and without and with_["recompute_layers"] == without["recompute_layers"]:
        lines.append(f"Adapters cost {share(with_['best_step_s'] / without['best_step_s'] - 1)} of the step without them.")
    few, more = found["cut-4"], found["cut-12"]
    if few and more and more["layers"] > few["layers"]:
        layer = (more["best_step_s"] - few["best_step_s"]) / (more["layers"] - few["layers"])
        lines.append(f"A layer takes {number(1e3 * layer, 3)} ms (from the two cuts).")
    routing = found["as-trained"].get("routing") or {}
    for modality, load in routing.items():
        lines.append(f"Load of the experts by {modality}: entropy {load['load_entropy']:.3f} (1 is even), the busiest at {load['worst_imbalance']:.1f} times the mean.")
    return text + "".join("\n\n" + line for line in lines)


def kernels(r):
    k = r.json("step/kernels.json").get("kernels") or {}
    if "absent" in k:
        return f"None: {k['absent']}."
    if not k:
        return "Not measured."
    rows = [[row["name"][:110], row["calls"], number(1e3 * row["s"], 2), share(row["s"] / max(k["busy_s"], 1e-12))] for row in k["kernels"][:25]]
    return f"{k['launches']} kernels in {number(1e3 * k['busy_s'], 1)} ms of a step; without any: **{share(k['idle_share'])}**; copies {number(1e3 * k['copies_s'], 1)} ms.\n\n" + table(["kernel", "calls", "ms", "share"], rows)


def ops(r):
    rows = []
    for name in ("ops", "ops-cudnn", "ops-16k"):
        j = r.json(f"micro/{name}.json")
        for op in j.get("ops", []):
            rows.append([op["op"] + (" + backward" if op["backward"] else ""), j["shape"]["tokens"], number(op["ms"], 3), number(op["plain_ms"], 3), share(op.get("share_of_limit")) if "share_of_limit" in op else "",
                         number(gib(op.get("peak_mib")), 2) if "peak_mib" in op else "", f"{op['difference']:.1e}"])
    return table(["operation", "tokens", "ms", "plain LibTorch, ms", "of the matmul limit", "peak GB", "difference"], rows)


def micro(r):
    text = []
    for what, first in (("attention", ["backend", "deterministic", "pass"]), ("grouped", ["product", "tokens", "routing"])):
        j = r.json(f"micro/{what}.json")
        rows = [[*(row[k] for k in first), number(row.get("ms"), 3) if "ms" in row else row.get("error"), number(row.get("tflops"), 2) if "tflops" in row else ""] for row in j.get("cases", [])]
        text.append(f"torch's {what}:\n\n" + table([*first, "ms", "TFLOP/s"], rows))
    return "\n\n".join(text)


def peers(r):
    ours, theirs = r.json("micro/peer-ours.json"), r.json("micro/peer.json")
    if not ours or not theirs:
        return "Not measured."
    rows = [[j["tool"], number(j["tokens_per_s"], 0), number(1e3 * j["best_step_s"], 1), number(gib(j["peak_mib"]), 2), f"{j['loss'][0]:.4f}"] for j in (ours, theirs)]
    return table(["one checkpoint of few layers, the same step", "tokens/s", "best ms", "peak GB", "first loss"], rows) + f"\n\n{ours['tokens_per_s'] / theirs['tokens_per_s']:.2f} times as fast, {ours['peak_mib'] / theirs['peak_mib']:.2f} of the memory."


def trainings(r):
    rows = []
    for name in ("tests/graft.json", "step/train.json"):
        j = r.json(name)
        if not j:
            rows.append([name, *["not measured"] * 6])
            continue
        beside = j.get("beside")
        apart = max(abs(a - b) / abs(b) for a, b in zip(j["loss"], beside["loss"])) if beside and beside["loss"] else None
        rows.append([name, j["steps"], number(j["tokens_per_s"], 0), f"{j['loss'][0]:.4f} → {j['loss'][-1]:.4f}", "same bytes" if j["same_bytes"] else "OTHER BYTES", "exact" if j["drift"]["exact"] else f"{j['drift']['max_abs']:.2e}",
                     share(apart) if beside else ""])
    return table(["training", "steps", "tokens/s", "loss", f"after SIGKILL and resuming", "text drift", "largest difference to the CPU's loss"], rows)


def decoding(r):
    rows = []
    for name in ("decode-plain", "decode-recorded"):
        j = r.json(f"step/{name}.json")
        rows.append([name, number(j.get("prefill_tokens_per_s"), 0) if j else "not measured", number(j.get("decode_step_ms"), 2) if j else "", number(j.get("decode_tokens_per_s"), 0) if j else "", number(j.get("image_tokens_per_s"), 0) if j else ""])
    a, b = r.json("step/decode-plain.json").get("ids"), r.json("step/decode-recorded.json").get("ids")
    return table(["decoding", "prefill tokens/s", "ms a step", "tokens/s", "image codes/s"], rows) + (f"\n\nBoth wrote the same ids: {'yes' if a == b else 'NO'}." if a and b else "")


def main():
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("report: give the folder that tools/gpu_bringup.sh wrote (--out)")
    r = Results(Path(sys.argv[1]))
    parts = r.parts()
    sections = [("Steps of the whole model", steps), ("Kernels of a step", kernels), ("Trainings", trainings), ("Beside transformers + PEFT", peers), ("Decoding", decoding), ("Tests", tests), ("Operations", ops), ("Micro", micro)]
    try:
        head = hardware(r, parts)
    except Exception as e:
        head = f"The machine's account is not readable: {type(e).__name__} {e}."
    dry = bool(parts) and parts[0]["device"] == "cpu"
    text = ["# A dry run on a CPU" if dry else "# What ran on a card", head, f"Targets: {TARGETS}."]
    if not parts:
        text.insert(1, "No stage has run here: tools/gpu_bringup.sh tests micro step --out DIR.")
    for title, write in sections:
        try:
            body = write(r)
        except Exception as e:  # a file of another version must not cost the others
            body = f"Not readable: {type(e).__name__} {e}."
        text.append(f"## {title}\n\n{body}")
    text.append("## Parts\n\n" + table(["stage", "part", "status", "seconds", "remark"], [[p["stage"], p["part"], p["status"], p["seconds"], p["reason"]] for p in parts]))
    report = "\n\n".join(text) + "\n"
    print(report)
    try:
        (r.out / "report.md").write_text(report)
    except OSError as e:
        sys.exit(f"report: cannot write {r.out / 'report.md'}: {e.strerror}")


if __name__ == "__main__":
    main()
