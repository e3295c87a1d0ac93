#!/usr/bin/env python3
"""Runs `moegraft bench` and its peers by turns on the same checkpoints and ids, and writes a table of ratios. See tools/bench_peers.sh.

All sides of a case run in processes of their own, one after the other, several times; who begins changes from round to round. Wall time is
read from outside too; peak resident memory is the kernel's count, for a step up to its end, for generation of the whole process. The matmul limit of a case is the largest that any of its runs measured, and both sides are held against
the same count of FLOPs, which moegraft prints.
"""
import argparse
import dataclasses
import datetime
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import compare_llama
from machine import HERE, ISAS, ROOT, ask_python, commit, gpu, hardware, isa_environment, log, read_gbytes, run, slug, spell, versions
from report import markdown

DTYPES = ["float32", "bfloat16"]
KINDS = ["steps", "implementations", "generation", "llama"]


@dataclasses.dataclass
class Shape:
    batches: tuple = ("4x512", "1x512", "1x128")
    sites: str = "gate,up,down"
    gated: tuple = ()  # our options for one more row: the step as a graft takes it, beside the peer's plain one
    generates: bool = True


SHAPES = {
    "fine32": Shape(),
    "fine64": Shape(),
    "mix8": Shape(),
    "odd48": Shape(("3x384",), generates=False),
    "smollm2": Shape(("4x512", "1x128")),
    # As many captions with 36 codes as fit 1024 tokens. Gated: begin and codes of every sequence.
    "quickstart": Shape(("24x43",), "gate,up,down,q,v", ("--image-share", "0.86", "--codes", "512", "--gate", "modality", "--labels", "image")),
    "tiny": Shape(("2x32",)),
}
QUICK, LLAMA_SHAPES = ["fine32"], ["fine32", "mha64", "mix8", "smollm2"]


class Comparison:
    def __init__(self, args):
        self.args = args
        self.models = Path(args.models)
        self.python, self.binary = args.python, args.binary
        hw = hardware()
        self.result = {"hardware": {**hw, "gpu": gpu() if args.device != "cpu" else ""}, "device": args.device, "commit": commit(), "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
                       "command": args.command, "versions": versions(args.python), "rounds": args.rounds, "steps": args.steps, "rank": args.rank, "load_at_start": os.getloadavg()[0], "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "each side's own"),
                       "isa": args.isa, "steps_table": [], "peer_implementations": [], "generation": [], "llama": [], "failures": []}
        name = "-".join(["peers", slug(self.result["hardware"]["gpu"].split(",")[0] or hw["cpu"]), *filter(None, [slug(args.isa), "llama" if args.only == ["llama"] else ""])])
        self.environment = self.result["environment"] = isa_environment(args.isa)
        self.read_gbytes = self.result["read_gbytes_per_s"] = read_gbytes(args.python, args.device)
        self.peer_gflops = self.result["peer_gflops"] = self.ask_peer_gflops()
        self.json = Path(args.out) / (name + ".json")
        self.markdown = Path(args.out) / (name + ".md")

    # Of a product that stays short where one dtype has no instructions and runs a hundred times slower than the other.
    def ask_peer_gflops(self):
        code = f"import json, peer\nprint(json.dumps({{d: peer.matmul_gflops(d, '{self.args.device}', 512) for d in {DTYPES}}}))"
        return json.loads(ask_python(self.python, code, self.environment))

    # A peer whose products in bf16 are several times slower than in float32 is held against us in float32: what its user would choose.
    def peer_dtype(self, dtype):
        return dtype if self.peer_gflops[dtype] > self.peer_gflops["float32"] / 4 else "float32"

    def label(self, shape, dtype, size):
        peer = self.peer_dtype(dtype)
        return f"{shape} {dtype} {size}" + (f", {self.args.isa}" if self.args.isa else "") + (f", peer in {peer}" if peer != dtype else "")

    # Asked for one instruction set, a figure of another is worse than none.
    def check_path(self, label, ran):
        path = ran.get("cpu", {}).get("path", "a path that it does not name")
        if self.args.isa and path != self.args.isa:
            self.result["failures"].append(f"{label}: asked for {self.args.isa}, moegraft ran {path}")

    def save(self):
        self.json.parent.mkdir(parents=True, exist_ok=True)
        self.json.write_text(json.dumps(self.result, indent=1) + "\n")
        self.markdown.write_text(markdown(self.result))

    # In the dtype that is computed in, as published checkpoints are.
    def checkpoint(self, shape, dtype):
        path = self.models / f"{shape}-{dtype}"
        if not (path / "config.json").exists():
            log(f"making {path}")
            subprocess.run([self.python, str(HERE / "make_random_moe.py"), shape, str(path), "--dtype", dtype], check=True, cwd=ROOT)
        return str(path)

    def ids(self, model, batch, seq):
        vocab = json.loads((ROOT / model / "config.json").read_text())["vocab_size"]
        path = self.models / f"ids-{vocab}-{batch}x{seq}.safetensors"
        if not (ROOT / path).exists():
            ask_python(self.python, f"import peer; from safetensors.torch import save_file; save_file({{'input_ids': peer.random_ids(({batch}, {seq}), {vocab})}}, {str(ROOT / path)!r})")
        return str(path)

    def device_options(self):
        return ["--device", self.args.device] + (["--threads", str(self.args.threads)] if self.args.threads else [])

    def ours(self, kind, model, *options):
        return [self.binary, *(["--cpu-path", self.args.isa] if self.args.isa else []), "bench", kind, model, *options, *self.device_options(), "--json"]

    def peer(self, script, model, *options):
        return [self.python, str(HERE / script), model, *options, *self.device_options()]

    def alternate(self, sides):
        """{name: command} -> {name: ([JSON of each round], [outside figures of each round])}."""
        runs = {name: ([], []) for name in sides}
        for i in range(self.args.rounds):
            order = list(sides) if i % 2 == 0 else list(sides)[::-1]
            for name in order:
                runs[name][0].append(run(sides[name], runs[name][1], self.environment))
        return runs

    def spell(self, commands):
        return {name: spell(command, self.environment) for name, command in commands.items()}

    # What a side says of its instruction set and kernels.
    def path(self, ran):
        return {key: ran[key] for key in ("cpu", "cpu_capability", "system", "dtype") if key in ran}

    def memory(self, inside, outside):
        if self.args.device != "cpu":
            return self.step_memory(inside)
        return statistics.median(r["max_rss_mib"] for r in outside)

    # As the kernel counts it up to the last step: the matrix product that is timed after it would weigh on the side that takes less.
    def step_memory(self, inside):
        return statistics.median(r["peak_mib"] for r in inside)

    def step_case(self, shape, dtype, batch, seq, gated=False):
        model = self.checkpoint(shape, dtype)
        ids = self.ids(model, batch, seq)
        label = self.label(shape, dtype, f"{batch}×{seq}" + (" gated" if gated else ""))
        common = ["--ids", ids, "--rank", str(self.args.rank), "--sites", SHAPES[shape].sites, "--steps", str(self.args.steps)]
        own = [*(SHAPES[shape].gated if gated else []), *(["--matmul", "256"] if self.peer_dtype(dtype) != dtype else [])]  # a large product would take minutes
        commands = {"moegraft": self.ours("step", model, *common, *own, "--dtype", dtype), "peer": self.peer("peer_step.py", model, *common, "--dtype", self.peer_dtype(dtype))}
        log("step", label)
        runs = self.alternate(commands)
        flops = runs["moegraft"][0][0]["flops_per_token"]
        limit = max(r["matmul_gflops"] for inside, _ in runs.values() for r in inside)
        case = {"label": label, "shape": shape, "dtype": dtype, "batch": batch, "seq": seq, "sites": SHAPES[shape].sites, "gated": gated, "isa": self.args.isa, "peer_dtype": self.peer_dtype(dtype), "flops_per_token": flops,
                "matmul_gflops": limit, "commands": self.spell(commands)}
        self.check_path(label, runs["moegraft"][0][0])
        for name, (inside, outside) in runs.items():
            steps = [s for r in inside for s in r["step_s"]]
            tokens = batch * seq
            case[name] = {"best_tokens_per_s": tokens / min(steps), "median_tokens_per_s": tokens / statistics.median(r["median_step_s"] for r in inside), "share_of_limit": flops * tokens / min(steps) / 1e9 / limit,
                          "peak_mib": self.step_memory(inside), "loss": inside[0]["loss"], "step_s": [r["step_s"] for r in inside],
                          **self.path(inside[0]), "outside": outside, "outside_step_s": min((s for o in outside for s in o["step_s"]), default=None)}
        # The least time by what must be computed and by what must come from memory: 1 where products alone set the pace.
        work_s, memory_s = flops * batch * seq / 1e9 / limit, runs["moegraft"][0][0]["memory_bytes"] / 1e9 / self.read_gbytes
        case["attainable_share"] = work_s / max(work_s, memory_s)
        a, b = case["moegraft"], case["peer"]
        case["ratio"] = {"best": a["best_tokens_per_s"] / b["best_tokens_per_s"], "median": a["median_tokens_per_s"] / b["median_tokens_per_s"], "peak": a["peak_mib"] / b["peak_mib"]}
        if a["outside_step_s"] and b["outside_step_s"]:
            case["ratio"]["outside"] = b["outside_step_s"] / a["outside_step_s"]
        case["first_loss_difference"] = abs(a["loss"][0] - b["loss"][0])
        if dtype == "float32" and not gated and not case["first_loss_difference"] <= 1e-4:
            self.result["failures"].append(f"{label}: first losses differ by {case['first_loss_difference']:.2e} ({a['loss'][0]:.6f} and {b['loss'][0]:.6f})")
        self.result["steps_table"].append(case)
        log(f"  {a['best_tokens_per_s']:.0f} / {b['best_tokens_per_s']:.0f} tokens/s = {case['ratio']['best']:.2f}, peak {a['peak_mib']:.0f} / {b['peak_mib']:.0f} MiB, limit share {a['share_of_limit']:.2f} / {b['share_of_limit']:.2f}")
        self.save()

    def implementations(self, shape, dtype, batch, seq):
        """The peer's other ways to run experts, so that it is known to be held against its best."""
        model = self.checkpoint(shape, dtype)
        ids = self.ids(model, batch, seq)
        for name in ["grouped_mm", "batched_mm", "eager"]:
            log("peer's experts:", name)
            command, outside = self.peer("peer_step.py", model, "--ids", ids, "--dtype", dtype, "--rank", str(self.args.rank), "--steps", "2", "--experts", name), []
            try:
                r = run(command, outside, self.environment)
                self.result["peer_implementations"].append({"shape": shape, "dtype": dtype, "batch": batch, "seq": seq, "experts": name, "tokens_per_s": r["tokens_per_s"], "peak_mib": self.step_memory([r])})
            except RuntimeError as error:
                self.result["peer_implementations"].append({"shape": shape, "dtype": dtype, "batch": batch, "seq": seq, "experts": name, "error": str(error)})
            self.save()

    def generation_case(self, shape, dtype, batch, pictures, prompt, tokens):
        model = self.checkpoint(shape, dtype)
        ids, many = self.ids(model, batch, prompt), self.ids(model, pictures, prompt)
        common = ["--tokens", str(tokens), "--rounds", "2", "--dtype", self.peer_dtype(dtype)]
        label = self.label(shape, dtype, f"{batch}×{prompt}+{tokens}")
        commands = {"moegraft": self.ours("generate", model, "--ids", ids, "--pictures", str(pictures), "--rank", str(self.args.rank), *common[:-1], dtype),
                    "peer": self.peer("peer_generate.py", model, "--ids", ids, *common),
                    "peer_many": self.peer("peer_generate.py", model, "--ids", many, *common),
                    "peer_many_lora": self.peer("peer_generate.py", model, "--ids", many, "--rank", str(self.args.rank), *common)}
        log("generate", label)
        runs = self.alternate(commands)
        best = lambda name, key: max(r[key] for r in runs[name][0])
        ours, theirs = runs["moegraft"][0][0]["ids"], runs["peer"][0][0]["ids"]
        same = sum(x == y for a, b in zip(ours, theirs) for x, y in zip(a, b)) / (batch * tokens)
        self.check_path(label, runs["moegraft"][0][0])
        case = {"label": label, "shape": shape, "dtype": dtype, "batch": batch, "prompt": prompt, "tokens": tokens, "pictures": pictures, "isa": self.args.isa, "peer_dtype": self.peer_dtype(dtype), "commands": self.spell(commands),
                "same_tokens": same, "paths": {name: self.path(runs[name][0][0]) for name in ("moegraft", "peer")},
                "prefill": {"moegraft": best("moegraft", "prefill_tokens_per_s"), "peer": best("peer", "prefill_tokens_per_s")},
                "decode": {"moegraft": best("moegraft", "decode_tokens_per_s"), "peer": best("peer", "decode_tokens_per_s")},
                "image": {"moegraft": best("moegraft", "image_tokens_per_s"), "peer": best("peer_many", "decode_tokens_per_s"), "peer_lora": best("peer_many_lora", "decode_tokens_per_s")},
                "peak_mib": {name: self.memory(*runs[name]) for name in ("moegraft", "peer", "peer_many")}}
        for key in ("prefill", "decode", "image"):
            case[key]["ratio"] = case[key]["moegraft"] / case[key]["peer"]
        self.result["generation"].append(case)
        log(f"  prefill {case['prefill']['ratio']:.2f}, decode {case['decode']['ratio']:.2f}, image tokens {case['image']['ratio']:.2f} times the peer; {100 * same:.0f} % of tokens the same")
        self.save()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    def words(known):
        def parse(text):
            unknown = [w for w in text.split(",") if w not in known]
            return text.split(",") if not unknown else parser.error(f"unknown {', '.join(unknown)}; known are {', '.join(known)}")
        return parse

    parser.add_argument("--quick", action="store_true", help="one shape, two rounds of two steps: does it work?")
    parser.add_argument("--out", default="tests/bench/results")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--shapes", type=words([*SHAPES, *LLAMA_SHAPES]))
    parser.add_argument("--dtypes", type=words(DTYPES), default=DTYPES)
    parser.add_argument("--batches", help="such as 4x512,1x128")
    parser.add_argument("--only", type=words(KINDS), default=KINDS[:3], help="llama: generation beside llama.cpp")
    parser.add_argument("--isa", choices=sorted(ISAS), default="", help="hold both sides to this instruction set")
    parser.add_argument("--llama-python", default=".venv-llama/bin/python", help="a Python with llama-cpp-python, gguf and safetensors")
    parser.add_argument("--models", default="models/bench", help="where checkpoints are made")
    parser.add_argument("--binary", default="build/moegraft")
    parser.add_argument("--python", default=".venv/bin/python")
    args = parser.parse_args()
    args.command = shlex.join(["tools/bench_peers.sh", *sys.argv[1:]])
    args.command = re.sub(r" --(binary|python) \S+", "", args.command)  # the script's own
    args.rounds = args.rounds or (2 if args.quick else 3)
    args.steps = args.steps or (2 if args.quick else 5)
    shapes = args.shapes or (QUICK if args.quick else [s for s in SHAPES if s != "tiny"])
    if unknown := [s for s in shapes if s not in SHAPES and args.only != ["llama"]]:
        parser.error(f"{', '.join(unknown)}: for --only llama")
    batches = lambda shape: [tuple(int(n) for n in b.split("x")) for b in (args.batches.split(",") if args.batches else SHAPES[shape].batches)]
    if os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1):
        log(f"warning: the machine is busy (load {os.getloadavg()[0]:.1f}); figures will not mean much")

    os.chdir(ROOT)
    comparison = Comparison(args)
    if "steps" in args.only:
        for shape in shapes:
            for dtype in args.dtypes:
                for batch, seq in batches(shape):
                    comparison.step_case(shape, dtype, batch, seq)
                    if SHAPES[shape].gated:
                        comparison.step_case(shape, dtype, batch, seq, gated=True)
    if "implementations" in args.only and not args.quick:
        for dtype in DTYPES:
            comparison.implementations(shapes[0], dtype, *batches(shapes[0])[0])
    if "generation" in args.only:
        for shape in shapes:
            for dtype in args.dtypes if SHAPES[shape].generates else []:
                comparison.generation_case(shape, dtype, 4, 16, 128, 16 if args.quick else 64)
    if "llama" in args.only:
        compare_llama.compare(comparison, args.shapes or (QUICK if args.quick else LLAMA_SHAPES), args.quick)
    comparison.save()
    print(comparison.markdown.read_text().split("## Commands")[0])
    slower = [c["label"] for c in comparison.result["steps_table"] if c["ratio"]["best"] < 1]
    log(f"written: {comparison.json} and {comparison.markdown}")
    if slower:
        log("slower than the peer:", ", ".join(slower))
    if comparison.result["failures"]:
        log("failed:", "; ".join(comparison.result["failures"]))
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, subprocess.CalledProcessError) as error:
        log("error:", error, getattr(error, "stderr", None) or "")
        sys.exit(1)
