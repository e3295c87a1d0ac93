#!/usr/bin/env python3
"""Runs `moegraft bench` and transformers + PEFT by turns on the same checkpoints and ids, and writes a table of ratios. See tools/bench_peers.sh.

Both sides of a case run in processes of their own, one after the other, several times; who begins changes from round to round. Wall time and peak
resident memory are read from outside (wait4). The matmul limit of a case is the largest that any of its runs measured, and both sides are held against
the same count of FLOPs, which moegraft prints.
"""
import argparse
import datetime
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent.relative_to(ROOT)
SHAPES = ["fine32", "fine64", "mix8"]
DTYPES = ["float32", "bfloat16"]
BATCHES = ["4x512", "1x512", "1x128"]


def log(*words):
    print(time.strftime("%H:%M:%S"), *words, file=sys.stderr, flush=True)


def run(command, outside=None):
    """A command's JSON; `outside` collects what this process sees of it: wall seconds, seconds between the lines that tell of its steps, and peak resident MiB
    as the kernel counts it."""
    with tempfile.TemporaryFile() as out:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, cwd=ROOT)
        errors, steps = [], []
        for line in child.stderr:
            if re.match(rb"step \d+ of \d+:", line):
                steps.append(time.perf_counter())
            errors.append(line.decode(errors="replace"))
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read().decode()
    if child.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} ended with {child.returncode}: {''.join(errors).strip()[-800:]}")
    if outside is not None:
        outside.append({"wall_s": wall, "max_rss_mib": usage.ru_maxrss / 1024, "cpu_s": usage.ru_utime + usage.ru_stime, "step_s": [b - a for a, b in zip(steps, steps[1:])]})
    return json.loads(text.strip().splitlines()[-1])


def read_gbytes(python, device):
    """GB/s at which all cores, or the GPU, read memory."""
    code = f"import time, torch\nx = torch.ones(1 << 14, 1 << 14, device='{device}')\nv = x[0].clone()\nt = []\nfor _ in range(6):\n    s = time.perf_counter(); (x @ v)[0].item(); t.append(time.perf_counter() - s)\nprint(x.nbytes / min(t) / 1e9)"
    return float(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def hardware():
    def lscpu(key):
        found = re.search(rf"^{key}:\s*(.+)$", subprocess.run(["lscpu"], capture_output=True, text=True).stdout, re.M)
        return found.group(1).strip() if found else ""

    flags = set(lscpu("Flags").split())
    return {"cpu": lscpu("Model name") or platform.machine(), "cores": os.cpu_count(), "usable_cores": len(os.sched_getaffinity(0)),
            "features": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16"}),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1), "system": platform.platform()}


def gpu():
    try:
        return subprocess.run(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def versions(python):
    code = "import json,torch,transformers,peft,platform;print(json.dumps(dict(python=platform.python_version(),torch=torch.__version__,transformers=transformers.__version__,peft=peft.__version__)))"
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}).stdout)


def commit():
    git = lambda *a: subprocess.run(["git", *a], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def slug(text):
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


class Comparison:
    def __init__(self, args):
        self.args = args
        self.models = Path(args.models)
        self.python, self.binary = args.python, args.binary
        hw = hardware()
        self.result = {"hardware": {**hw, "gpu": gpu() if args.device != "cpu" else ""}, "device": args.device, "commit": commit(), "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
                       "command": args.command, "versions": versions(args.python), "rounds": args.rounds, "steps": args.steps, "rank": args.rank, "load_at_start": os.getloadavg()[0], "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "each side's own"),
                       "steps_table": [], "peer_implementations": [], "generation": [], "failures": []}
        name = "peers-" + slug(self.result["hardware"]["gpu"].split(",")[0] or hw["cpu"])
        self.read_gbytes = self.result["read_gbytes_per_s"] = read_gbytes(args.python, args.device)
        self.json = Path(args.out) / (name + ".json")
        self.markdown = Path(args.out) / (name + ".md")

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
            code = f"import peer; from safetensors.torch import save_file; save_file({{'input_ids': peer.random_ids(({batch}, {seq}), {vocab})}}, {str(ROOT / path)!r})"
            subprocess.run([self.python, "-c", code], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(HERE)})
        return str(path)

    def device_options(self):
        return ["--device", self.args.device] + (["--threads", str(self.args.threads)] if self.args.threads else [])

    def ours(self, kind, model, *options):
        return [self.binary, "bench", kind, model, *options, *self.device_options(), "--json"]

    def peer(self, script, model, *options):
        return [self.python, str(HERE / script), model, *options, *self.device_options()]

    def alternate(self, sides):
        """{name: command} -> {name: ([JSON of each round], [outside figures of each round])}."""
        runs = {name: ([], []) for name in sides}
        for i in range(self.args.rounds):
            order = list(sides) if i % 2 == 0 else list(sides)[::-1]
            for name in order:
                runs[name][0].append(run(sides[name], runs[name][1]))
        return runs

    def memory(self, inside, outside):
        if self.args.device != "cpu":
            return statistics.median(r["peak_mib"] for r in inside)
        return statistics.median(r["max_rss_mib"] for r in outside)

    def step_case(self, shape, dtype, batch, seq):
        model = self.checkpoint(shape, dtype)
        ids = self.ids(model, batch, seq)
        options = ["--ids", ids, "--dtype", dtype, "--rank", str(self.args.rank), "--steps", str(self.args.steps)]
        commands = {"moegraft": self.ours("step", model, *options), "peer": self.peer("peer_step.py", model, *options)}
        log("step", shape, dtype, f"{batch}x{seq}")
        runs = self.alternate(commands)
        flops = runs["moegraft"][0][0]["flops_per_token"]
        limit = max(r["matmul_gflops"] for inside, _ in runs.values() for r in inside)
        case = {"shape": shape, "dtype": dtype, "batch": batch, "seq": seq, "flops_per_token": flops, "matmul_gflops": limit, "commands": {k: shlex.join(c) for k, c in commands.items()}}
        for name, (inside, outside) in runs.items():
            steps = [s for r in inside for s in r["step_s"]]
            tokens = batch * seq
            case[name] = {"best_tokens_per_s": tokens / min(steps), "median_tokens_per_s": tokens / statistics.median(r["median_step_s"] for r in inside), "share_of_limit": flops * tokens / min(steps) / 1e9 / limit,
                          "peak_mib": self.memory(inside, outside), "peak_mib_inside": [r["peak_mib"] for r in inside], "loss": inside[0]["loss"], "step_s": [r["step_s"] for r in inside],
                          "outside": outside, "outside_step_s": min((s for o in outside for s in o["step_s"]), default=None)}
        # The least time by what must be computed and by what must come from memory: 1 where products alone set the pace.
        work_s, memory_s = flops * batch * seq / 1e9 / limit, runs["moegraft"][0][0]["memory_bytes"] / 1e9 / self.read_gbytes
        case["attainable_share"] = work_s / max(work_s, memory_s)
        a, b = case["moegraft"], case["peer"]
        case["ratio"] = {"best": a["best_tokens_per_s"] / b["best_tokens_per_s"], "median": a["median_tokens_per_s"] / b["median_tokens_per_s"], "peak": a["peak_mib"] / b["peak_mib"]}
        if a["outside_step_s"] and b["outside_step_s"]:
            case["ratio"]["outside"] = b["outside_step_s"] / a["outside_step_s"]
        case["first_loss_difference"] = abs(a["loss"][0] - b["loss"][0])
        if dtype == "float32" and not case["first_loss_difference"] <= 1e-4:
            self.result["failures"].append(f"{shape} {dtype} {batch}x{seq}: first losses differ by {case['first_loss_difference']:.2e} ({a['loss'][0]:.6f} and {b['loss'][0]:.6f})")
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
                r = run(command, outside)
                self.result["peer_implementations"].append({"shape": shape, "dtype": dtype, "batch": batch, "seq": seq, "experts": name, "tokens_per_s": r["tokens_per_s"], "peak_mib": self.memory([r], outside)})
            except RuntimeError as error:
                self.result["peer_implementations"].append({"shape": shape, "dtype": dtype, "batch": batch, "seq": seq, "experts": name, "error": str(error)})
            self.save()

    def generation_case(self, shape, dtype, batch, pictures, prompt, tokens):
        model = self.checkpoint(shape, dtype)
        ids, many = self.ids(model, batch, prompt), self.ids(model, pictures, prompt)
        common = ["--tokens", str(tokens), "--dtype", dtype, "--rounds", "2"]
        commands = {"moegraft": self.ours("generate", model, "--ids", ids, "--pictures", str(pictures), "--rank", str(self.args.rank), *common),
                    "peer": self.peer("peer_generate.py", model, "--ids", ids, *common),
                    "peer_many": self.peer("peer_generate.py", model, "--ids", many, *common),
                    "peer_many_lora": self.peer("peer_generate.py", model, "--ids", many, "--rank", str(self.args.rank), *common)}
        log("generate", shape, dtype, f"{batch}x{prompt}+{tokens}")
        runs = self.alternate(commands)
        best = lambda name, key: max(r[key] for r in runs[name][0])
        ours, theirs = runs["moegraft"][0][0]["ids"], runs["peer"][0][0]["ids"]
        same = sum(x == y for a, b in zip(ours, theirs) for x, y in zip(a, b)) / (batch * tokens)
        case = {"shape": shape, "dtype": dtype, "batch": batch, "prompt": prompt, "tokens": tokens, "pictures": pictures, "commands": {k: shlex.join(c) for k, c in commands.items()}, "same_tokens": same,
                "prefill": {"moegraft": best("moegraft", "prefill_tokens_per_s"), "peer": best("peer", "prefill_tokens_per_s")},
                "decode": {"moegraft": best("moegraft", "decode_tokens_per_s"), "peer": best("peer", "decode_tokens_per_s")},
                "image": {"moegraft": best("moegraft", "image_tokens_per_s"), "peer": best("peer_many", "decode_tokens_per_s"), "peer_lora": best("peer_many_lora", "decode_tokens_per_s")},
                "peak_mib": {name: self.memory(*runs[name]) for name in ("moegraft", "peer", "peer_many")}}
        for key in ("prefill", "decode", "image"):
            case[key]["ratio"] = case[key]["moegraft"] / case[key]["peer"]
        self.result["generation"].append(case)
        log(f"  prefill {case['prefill']['ratio']:.2f}, decode {case['decode']['ratio']:.2f}, image tokens {case['image']['ratio']:.2f} times the peer; {100 * same:.0f} % of tokens the same")
        self.save()


def table(header, rows):
    return "\n".join("| " + " | ".join(str(c) for c in row) + " |" for row in [header, ["---"] + ["---:"] * (len(header) - 1), *rows]) + "\n"


def markdown(r):
    hw = r["hardware"]
    where = f"{hw['gpu']} on {hw['cpu']}" if hw["gpu"] else f"{hw['cpu']}, {hw['usable_cores']} cores ({', '.join(hw['features'])}), {hw['memory_gib']} GiB"
    v = r["versions"]
    text = [f"# moegraft beside transformers + PEFT\n\n{where}; {hw['system']}. Commit {r['commit']}, {r['date']}. "
            f"torch {v['torch']}, transformers {v['transformers']}, PEFT {v['peft']}, Python {v['python']}. Load average before the start: {r['load_at_start']:.2f}; OMP_WAIT_POLICY: {r['omp_wait_policy']}.\n\n```\n{r['command']}\n```\n",
            f"## Training step\n\nLoRA of rank {r['rank']} on all experts, gate open, every token labelled, same checkpoint and ids; forward, loss, backward, AdamW. Both sides by turns, {r['rounds']} rounds of {r['steps']} steps: "
            "tokens/s of the best step (in brackets the median). Peak is the process's resident memory seen from outside (the allocator's on a GPU). The limit is the rate of a large matrix product in the same dtype and runs; the work is "
            "2 FLOP per active parameter forward, as much for the gradient of the activations, and LoRA's own. \"Outside\" is the same ratio by the clock of the process that started both, between the lines that tell of steps. "
            f"\"Attainable\" is how much of the limit can be reached at best, where frozen weights (once forward, once backward) and what is trained come from memory at {r['read_gbytes_per_s']:.0f} GB/s.\n"]
    rows = []
    for c in r["steps_table"]:
        a, b, q = c["moegraft"], c["peer"], c["ratio"]
        rate = lambda s: f"{s['best_tokens_per_s']:.0f} ({s['median_tokens_per_s']:.0f})"
        rows.append([f"{c['shape']} {c['dtype']} {c['batch']}×{c['seq']}", rate(a), rate(b), f"**{q['best']:.2f}** ({q['median']:.2f})", f"{q['outside']:.2f}" if "outside" in q else "", f"{a['peak_mib']:.0f}", f"{b['peak_mib']:.0f}",
                     f"**{q['peak']:.2f}**", f"{c['matmul_gflops']:.0f}", f"{100 * a['share_of_limit']:.0f} %", f"{100 * b['share_of_limit']:.0f} %",
                     f"{100 * c['attainable_share']:.0f} %", f"{100 * a['share_of_limit'] / c['attainable_share']:.0f} %"])
    text.append(table(["case", "moegraft tokens/s", "peer tokens/s", "ratio", "outside", "moegraft MiB", "peer MiB", "ratio", "limit GF/s", "moegraft of limit", "peer of limit", "attainable", "moegraft of that"], rows))
    text.append("Losses of the first round, per step:\n")
    losses = [[f"{c['shape']} {c['dtype']} {c['batch']}×{c['seq']}", *(" ".join(f"{x:.5f}" for x in c[side]["loss"]) for side in ("moegraft", "peer")), f"{c['first_loss_difference']:.1e}"] for c in r["steps_table"]]
    text.append(table(["case", "moegraft", "peer", "first differs by"], losses))
    if r["peer_implementations"]:
        text.append("## The peer's ways to run experts\n")
        rows = [[f"{c['shape']} {c['dtype']} {c['batch']}×{c['seq']} {c['experts']}"] + ([f"{c['tokens_per_s']:.0f}", f"{c['peak_mib']:.0f}"] if "error" not in c else ["failed", ""]) for c in r["peer_implementations"]]
        text.append(table(["case", "tokens/s", "peak MiB"], rows))
    if r["generation"]:
        text.append("## Generation\n\nGreedy text from the same prompts with cached keys and values; image tokens: one picture's codes per sequence, drawn in one batch with LoRA acting on them, beside the peer's text decode at that batch, "
                    "plain and with the same LoRA unmerged. Tokens/s; the best of all rounds.\n")
        rows = []
        for c in r["generation"]:
            p, d, i = c["prefill"], c["decode"], c["image"]
            rows.append([f"{c['shape']} {c['dtype']} {c['batch']}×{c['prompt']}+{c['tokens']}", f"{p['moegraft']:.0f} / {p['peer']:.0f} = **{p['ratio']:.2f}**", f"{d['moegraft']:.0f} / {d['peer']:.0f} = **{d['ratio']:.2f}**",
                         f"{c['pictures']}: {i['moegraft']:.0f} / {i['peer']:.0f} = **{i['ratio']:.2f}** (LoRA: {i['peer_lora']:.0f})", f"{c['peak_mib']['moegraft']:.0f} / {c['peak_mib']['peer']:.0f}", f"{100 * c['same_tokens']:.0f} %"])
        text.append(table(["case", "prefill", "decode", "image tokens", "peak MiB", "same tokens"], rows))
    text.append("## Commands\n\nFrom the project's root:\n\n```")
    for c in r["steps_table"] + r["generation"]:
        text += list(c["commands"].values())
    text.append("```\n")
    if r["failures"]:
        text.append("## Failures\n\n" + "\n".join("- " + f for f in r["failures"]) + "\n")
    return "\n".join(text)


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
    parser.add_argument("--shapes", type=words(SHAPES + ["tiny"]))
    parser.add_argument("--dtypes", type=words(DTYPES), default=DTYPES)
    parser.add_argument("--batches", help="such as 4x512,1x128")
    parser.add_argument("--only", type=words(["steps", "implementations", "generation"]), default=["steps", "implementations", "generation"])
    parser.add_argument("--models", default="models/bench", help="where checkpoints are made")
    parser.add_argument("--binary", default="build/moegraft")
    parser.add_argument("--python", default=".venv/bin/python")
    args = parser.parse_args()
    args.command = shlex.join(["tools/bench_peers.sh", *sys.argv[1:]])
    args.command = re.sub(r" --(binary|python) \S+", "", args.command)  # the script's own
    args.rounds = args.rounds or (2 if args.quick else 3)
    args.steps = args.steps or (2 if args.quick else 5)
    shapes = args.shapes or (SHAPES[:1] if args.quick else SHAPES)
    batches = [tuple(int(n) for n in b.split("x")) for b in (args.batches.split(",") if args.batches else BATCHES)]
    if os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1):
        log(f"warning: the machine is busy (load {os.getloadavg()[0]:.1f}); figures will not mean much")

    os.chdir(ROOT)
    comparison = Comparison(args)
    if "steps" in args.only:
        for shape in shapes:
            for dtype in args.dtypes:
                for batch, seq in batches:
                    comparison.step_case(shape, dtype, batch, seq)
    if "implementations" in args.only and not args.quick:
        comparison.implementations(shapes[0], "float32", *batches[0])
        comparison.implementations(shapes[0], "bfloat16", *batches[0])
    if "generation" in args.only:
        for shape in shapes:
            for dtype in args.dtypes:
                comparison.generation_case(shape, dtype, 4, 16, 128, 16 if args.quick else 64)
    comparison.save()
    print(comparison.markdown.read_text().split("## Commands")[0])
    slower = [f"{c['shape']} {c['dtype']} {c['batch']}x{c['seq']}" for c in comparison.result["steps_table"] if c["ratio"]["best"] < 1]
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
        log("error:", error)
        sys.exit(1)
