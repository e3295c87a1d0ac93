#!/usr/bin/env python3
"""Trains a real run (prefetch, routing statistics, checkpoints in the background), once in peace and once with SIGKILL and a resume, and compares the bytes; then
holds the text logits of what was trained against the base's. Prints one JSON object. Exits with 1 when bytes or text differ.

    train.py MOEGRAFT graft.yaml OUT [--device cuda] [--steps 20] [--beside cpu] [--set KEY=VALUE]

--beside: the same steps on another device too; both series of losses are in the output. Needs no Python package.
"""
import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("moegraft")
    parser.add_argument("config")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--beside", default="")
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    every = max(1, args.steps // 4)

    def command(run, device, resume):
        keys = [f"run.dir={args.out / run}", f"model.device={device}", f"train.steps={args.steps}", f"checkpoint.every={every}", *args.set]
        return [args.moegraft, "train", "-c", args.config, "--resume", resume, *(word for key in keys for word in ("--set", key))]

    def finish(run, device, resume):
        r = subprocess.run(command(run, device, resume), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if r.returncode != 0:
            raise SystemExit(f"train: {run} on {device} ended with {r.returncode}: {r.stderr.strip()[-1500:]}")

    def lines(run):
        file = args.out / run / "metrics.jsonl"
        return [j for j in map(json.loads, file.read_text().splitlines()) if "loss" in j] if file.exists() else []

    def checkpoints(run):
        return sorted((args.out / run / "checkpoints").glob("step-*"))  # a checkpoint takes its name when it is whole

    start = time.perf_counter()
    finish("calm", args.device, "none")
    seconds = time.perf_counter() - start
    out = {"tool": "train", "device": args.device, "steps": args.steps, "seconds_with_start": seconds, "loss": [j["loss"] for j in lines("calm")], "grad_norm": [j["grad_norm"] for j in lines("calm")]}
    steady = lines("calm")[max(1, args.steps // 4):]  # buffers, layouts and the first checkpoint are behind
    out["tokens_per_s"] = sorted(j["tokens_per_s"] for j in steady)[len(steady) // 2]
    out["data_wait_share"] = max(j.get("data_wait_share", 0) for j in steady)
    out["checkpoint_stall_share"] = max((j.get("checkpoint_stall_share", 0) for j in steady), default=0)

    # Killed as soon as it has a checkpoint beyond the first, the one of step 0.
    child = subprocess.Popen(command("killed", args.device, "none"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None and len(checkpoints("killed")) < 2:
        time.sleep(0.002)
    if child.poll() is None:
        child.send_signal(signal.SIGKILL)
    out["killed_by"] = -child.wait()
    out["killed_after_step"] = max((j["step"] for j in lines("killed")), default=0)
    finish("killed", args.device, "auto")
    last = {run: checkpoints(run)[-1] for run in ("calm", "killed")}
    names = sorted(p.name for p in last["calm"].glob("*.safetensors"))
    out["compared"] = names
    out["same_bytes"] = bool(names) and last["calm"].name == last["killed"].name and all((last["calm"] / n).read_bytes() == (last["killed"] / n).read_bytes() for n in names)

    drift = args.out / "drift.yaml"
    drift.write_text("drift: { dtypes: [bfloat16] }\n")
    r = subprocess.run([args.moegraft, "eval", str(args.out / "calm"), "-c", str(drift), "--device", args.device, "--json"], capture_output=True, text=True)
    if r.returncode != 0:
        raise SystemExit(f"train: eval ended with {r.returncode}: {r.stderr.strip()[-800:]}")
    out["drift"] = json.loads(r.stdout)["drift"]["bfloat16"]
    if args.beside:
        finish("beside", args.beside, "none")
        out["beside"] = {"device": args.beside, "loss": [j["loss"] for j in lines("beside")], "grad_norm": [j["grad_norm"] for j in lines("beside")]}
    print(json.dumps(out))
    faults = [text for wrong, text in ((not out["same_bytes"], "the resumed run has other bytes than the one that was not interrupted"),
                                       (not out["drift"]["exact"], "text logits differ from the base's"), (out["killed_by"] != signal.SIGKILL, "the run ended before it could be killed")) if wrong]
    for text in faults:
        print(f"train: {text}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
