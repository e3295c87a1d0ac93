#!/usr/bin/env python3
"""Steps of 1, 2 and 4 processes under every layout, their exchanges, what checkpoints take, and how well `moegraft inspect --plan` foresees the step times.
See tools/bench_scaling.sh.

Strong scaling: the same global batch whatever the number of processes, and the same cores: each process has cores / processes threads. So on one machine
the best to be had is the speed of one process; what is lost is the price of the exchange. Layouts run by turns, several rounds; the median step counts.
"""
import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import ROOT, commit, hardware, log, slug
from report import table

LAYOUTS = {  # name -> (options of bench step, --plan) for n processes; None where it makes no sense
    "data": lambda n: ([], ""),
    "data, optimizer sharded": lambda n: (["--shard-optimizer"], ",shard_optimizer=true") if n > 1 else None,
    "expert": lambda n: (["--expert-parallel", str(n)], f",expert={n}") if n > 1 else None,
    "data x expert 2": lambda n: (["--expert-parallel", "2"], ",expert=2") if n > 2 else None,
    "base and optimizer sharded": lambda n: (["--shard-base", "--shard-optimizer"], ",shard_base=true,shard_optimizer=true") if n > 1 else None,
}


class Scaling:
    def __init__(self, args):
        self.args, hw = args, hardware()
        self.cores = hw["usable_cores"]
        self.model = str(Path(args.models) / f"{args.shape}-{args.dtype}")
        self.result = {"hardware": hw, "commit": commit(), "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "command": args.command, "load_at_start": os.getloadavg()[0],
                       "shape": args.shape, "dtype": args.dtype, "batch": args.batch, "seq": args.seq, "rounds": args.rounds, "steps": args.steps, "measured": [], "steps_table": [], "predicted": [], "checkpoint": []}
        name = "scaling-" + slug(hw["cpu"])
        self.json, self.markdown = Path(args.out) / (name + ".json"), Path(args.out) / (name + ".md")

    def threads(self, processes):
        return max(1, self.cores // processes)

    def run(self, processes, *words):
        command = [self.args.binary, *(["launch", "--nproc", str(processes), "--"] if processes > 1 else []), "bench", *words, "--threads", str(self.threads(processes)), "--json"]
        r = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(self.threads(processes))})
        if r.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)} ended with {r.returncode}: {r.stderr.strip()[-800:]}")
        return {**json.loads(r.stdout.strip().splitlines()[-1]), "command": f"OMP_NUM_THREADS={self.threads(processes)} " + shlex.join(command)}

    def step(self, processes, options, batch=None, threads_of=None, **more):
        a = self.args
        words = ["step", self.model, "--dtype", a.dtype, "--batch", str(batch or a.batch), "--seq", str(a.seq), "--steps", str(a.steps), *options]
        if threads_of:  # one process with the threads that each of several has
            command = [a.binary, "bench", *words, "--threads", str(self.threads(threads_of)), "--json"]
            r = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
            return {**json.loads(r.stdout.strip().splitlines()[-1]), "command": shlex.join(command)}
        return self.run(processes, *words)

    def save(self):
        self.json.parent.mkdir(parents=True, exist_ok=True)
        self.json.write_text(json.dumps(self.result, indent=1) + "\n")
        self.markdown.write_text(markdown(self.result))

    def make_model(self):
        if not (ROOT / self.model / "config.json").exists():
            log("making", self.model)
            subprocess.run([self.args.python, str(Path(__file__).with_name("make_random_moe.py")), self.args.shape, self.model, "--dtype", self.args.dtype], check=True, cwd=ROOT)

    def steps(self):
        cases = [(n, name, *layout(n)) for n in self.args.processes for name, layout in LAYOUTS.items() if layout(n)]
        runs = {(n, name): [] for n, name, _, _ in cases}
        for i in range(self.args.rounds):
            for n, name, options, _ in cases if i % 2 == 0 else cases[::-1]:
                log("step:", n, "processes,", name)
                runs[n, name].append(self.step(n, options))
        alone = statistics.median(r["median_step_s"] for r in runs[1, "data"]) if (1, "data") in runs else None
        for n, name, options, plan in cases:
            inside = runs[n, name]
            seconds = statistics.median(r["median_step_s"] for r in inside)
            self.result["steps_table"].append({"processes": n, "threads": self.threads(n), "layout": name, "median_step_s": seconds, "best_step_s": min(r["best_step_s"] for r in inside), "tokens_per_s": inside[0]["tokens"] / seconds,
                                               "of_one_process": alone / seconds if alone else None, "wait_share": statistics.median(r["wait_share"] for r in inside), "mib_per_step": inside[0]["bytes_per_step"] / 2**20,
                                               "traffic_of_rank_0": inside[0].get("traffic_of_rank_0", {}), "peak_mib_by_rank": inside[0]["peak_mib_by_rank"], "first_loss": inside[0]["loss"][0], "command": inside[0]["command"], "plan": plan})
        self.save()

    def collectives(self):
        for n in self.args.processes:
            if n > 1:
                log("collectives:", n, "processes")
                self.result["measured"].append(self.run(n, "collectives", *(["--sizes", self.args.sizes] if self.args.sizes else [])))
        self.save()

    def predictions(self):
        """One process with the threads and the tokens that each of several has, and the exchanges, foretell the steps of several."""
        for n in self.args.processes:
            if n == 1:
                continue
            log("prediction:", n, "processes")
            alone = [self.step(1, [], batch=batch, threads_of=n) for batch in dict.fromkeys([max(1, self.args.batch // n), self.args.batch])]
            exchanges = [m for m in self.result["measured"] if m["bench"] == "collectives" and m["processes"] == n]
            with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
                json.dump({"measured": alone + exchanges}, file)
                file.flush()
                for case in self.result["steps_table"]:
                    if case["processes"] != n:
                        continue
                    command = [self.args.binary, "inspect", self.model, "--plan", f"gpus={n}{case['plan']}", "--measured", file.name, "--json"]
                    plan = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)["cluster"]
                    self.result["predicted"].append({"processes": n, "layout": case["layout"], "predicted_step_s": plan["step_seconds"], "measured_step_s": case["median_step_s"], "ratio": plan["step_seconds"] / case["median_step_s"],
                                                     "predicted_mib": plan["step_traffic_bytes"] and sum(plan["step_traffic_bytes"].values()) * n / 2**20, "measured_mib": case["mib_per_step"],
                                                     "predicted_memory_mib": plan["process_memory_bytes"] / 2**20, "measured_memory_mib": max(case["peak_mib_by_rank"]), "compute_seconds": plan["compute_seconds"], "seconds_under_way": plan["seconds_under_way"]})
            self.result["measured"] += alone
        self.save()

    def checkpoints(self):
        for n in self.args.processes[:2]:
            log("checkpoints:", n, "processes")
            with tempfile.TemporaryDirectory(dir=self.args.scratch) as folder:
                r = self.step(n, ["--save", folder])
            self.result["checkpoint"].append({"processes": n, "step_s": r["median_step_s"], "command": r["command"].replace(folder, "FOLDER"), **r["checkpoint"]})
        self.save()


def markdown(r):
    hw = r["hardware"]
    text = [f"# Steps of several processes on one machine\n\n{hw['cpu']}, {hw['usable_cores']} usable cores ({', '.join(hw['features'])}), {hw['memory_gib']} GiB; {hw['system']}. Commit {r['commit']}, {r['date']}. "
            f"Load average before the start: {r['load_at_start']:.2f}.\n\n```\n{r['command']}\n```\n\n"
            f"{r['shape']} in {r['dtype']}, LoRA of rank 16 on all experts, every token labelled; {r['batch']} sequences of {r['seq']} tokens a step, of all processes together. Gloo over the loopback device. Each process has cores / processes threads (at least one), "
            "so all rows have the same cores: 1.00 of one process is the best that they can do here, and where there are more processes than cores they take turns. The base sharded on CPUs works without packed weights and computes every layer twice: it is for memory, not for speed.\n"]
    rows = [[c["processes"], c["threads"], c["layout"], f"{1e3 * c['median_step_s']:.0f}", f"{c['tokens_per_s']:.0f}", f"{c['of_one_process']:.2f}" if c["of_one_process"] else "", f"{100 * c['wait_share']:.0f} %", f"{c['mib_per_step']:.1f}",
             f"{max(c['peak_mib_by_rank']):.0f}"] for c in r["steps_table"]]
    text.append("## Step time\n\nMedian over rounds of each run's median step; waiting is the mean share of a step that a process waits for others.\n\n" +
                table(["processes", "threads each", "layout", "ms", "tokens/s", "of one process", "waiting", "MiB handed over", "largest peak MiB"], rows))
    if r["predicted"]:
        rows = [[p["processes"], p["layout"], f"{1e3 * p['predicted_step_s']:.0f}", f"{1e3 * p['measured_step_s']:.0f}", f"{p['ratio']:.2f}", f"{p['predicted_mib']:.2f}", f"{p['measured_mib']:.2f}", f"{p['predicted_memory_mib']:.0f}",
                 f"{p['measured_memory_mib']:.0f}"] for p in r["predicted"]]
        off = [abs(p["ratio"] - 1) for p in r["predicted"] if "base" not in p["layout"]]
        text.append("## Predicted by `moegraft inspect --plan`\n\nFrom one process's step (with the threads and tokens that each of several has) and the exchanges below. Not in the model: caches and memory bandwidth that processes share, uneven routing, the slower "
                    "products on weights that are not packed (sharded base on CPUs). " + (f"Without the sharded base the step times are off by {100 * statistics.mean(off):.0f} % in the mean, {100 * max(off):.0f} % at most.\n\n" if off else "\n\n") +
                    table(["processes", "layout", "predicted ms", "measured ms", "ratio", "predicted MiB handed over", "measured", "predicted MiB of memory", "measured"], rows))
    if r["checkpoint"]:
        rows = [[c["processes"], f"{c['bytes_of_rank_0'] / 2**20:.1f}", *[f"{1e3 * c[k][w]:.1f}" for k in ("async", "at_once") for w in ("stall_s", "write_s")], f"{1e3 * c['step_s']:.0f}", f"{1e3 * c['async']['step_beside_s']:.0f}",
                 f"{100 * c['async']['stall_share_every_100']:.3f} %", f"{100 * c['at_once']['stall_share_every_100']:.3f} %"] for c in r["checkpoint"]]
        text.append("## Checkpoints\n\nThe stall is what save() keeps the training thread; the share is of the training time at the default interval of 100 steps.\n\n" +
                    table(["processes", "MiB of rank 0", "async: stall ms", "writing ms", "at once: stall ms", "writing ms", "step ms", "step beside the writing ms", "async: share", "at once: share"], rows))
    rows = []
    for m in r["measured"]:
        if m["bench"] == "collectives":
            rows += [[m["processes"], c["op"], f"{c['bytes'] / 1024:.0f}", f"{c['ms']:.3f}", f"{c['best_ms']:.3f}", f"{c['algorithm_gb_per_s']:.3f}", f"{c['bus_gb_per_s']:.3f}"] for c in m["collectives"]]
    if rows:
        text.append("## Exchanges\n\n" + table(["processes", "collective", "KiB", "ms", "best ms", "GB/s of message", "GB/s on links"], sorted(rows, key=lambda row: (row[0], row[1]))))
    commands = list(dict.fromkeys([c["command"] for c in r["steps_table"]] + [m["command"] for m in r["measured"]] + [c["command"] for c in r["checkpoint"]]))
    return "\n".join(text) + "\n## Commands\n\n```\n" + "\n".join(commands) + "\n```\n"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--binary", default=os.environ.get("MOEGRAFT_BENCH_BINARY", "build/moegraft"))
    p.add_argument("--python", default=os.environ.get("MOEGRAFT_BENCH_PYTHON", ".venv/bin/python"))
    p.add_argument("--out", default="tests/bench/results")
    p.add_argument("--models", default="models/bench")
    p.add_argument("--scratch", help="where checkpoints are written (default: the system's temporary folder)")
    p.add_argument("--shape", default="fine32")
    p.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    p.add_argument("--processes", type=lambda s: [int(x) for x in s.split(",")], default=[1, 2, 4])
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--seq", type=int, default=512)
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--sizes", default="")
    p.add_argument("--quick", action="store_true", help="shorter sequences, one round")
    args = p.parse_args()
    args.command = "tools/bench_scaling.sh " + shlex.join(a for a in sys.argv[1:]) if sys.argv[1:] else "tools/bench_scaling.sh"
    if args.quick:
        args.seq, args.steps, args.rounds = 128, 4, 1
        args.sizes = args.sizes or "1K,64K,1M,8M"
    bench = Scaling(args)
    bench.make_model()
    bench.steps()
    bench.collectives()
    bench.predictions()
    bench.checkpoints()
    log("wrote", bench.json, "and", bench.markdown)


if __name__ == "__main__":
    main()
