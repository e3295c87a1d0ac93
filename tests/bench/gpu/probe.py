#!/usr/bin/env python3
"""What the card is and what it can do at most: the two ceilings of every figure that follows. Prints one JSON object.

    probe.py [--device cuda]

copy_gb_per_s: a large tensor copied, bytes read and written; matmul_tflops: bf16 8192 x 8192 x 8192. Needs torch.
"""
import argparse
import json
import platform
import shutil
import subprocess
import time

import torch


def smi(keys):
    if not shutil.which("nvidia-smi"):
        return None
    r = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader,nounits"], capture_output=True, text=True)
    if r.returncode != 0:
        return None
    return [dict(zip(keys, (v.strip() for v in line.split(",")))) for line in r.stdout.strip().splitlines()]


def best_of(run, device, rounds):
    run()
    best = float("inf")
    for _ in range(rounds):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    device = parser.parse_args().device
    big = device == "cuda"
    out = {"tool": "probe", "device": device, "python": platform.python_version(), "torch": torch.__version__, "torch_cuda": torch.version.cuda, "system": platform.platform()}
    if big:
        if not torch.cuda.is_available():
            raise SystemExit("probe: torch sees no CUDA device; nvidia-smi must list one, and torch must be a CUDA build")
        p = torch.cuda.get_device_properties(0)
        out.update(name=p.name, capability=f"{p.major}.{p.minor}", memory_gib=p.total_memory / 2**30, multiprocessors=p.multi_processor_count, cudnn=torch.backends.cudnn.version(),
                   cards=smi(["name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.mem", "power.limit", "persistence_mode", "mig.mode.current"]))
    else:
        out["name"] = platform.processor() or platform.machine()
    source = torch.empty((1 << 30 if big else 1 << 24), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    out["copy_gb_per_s"] = 2 * source.numel() / best_of(lambda: target.copy_(source), device, 10) / 1e9
    n = 8192 if big else 512
    x, y = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    z = x @ y
    out["matmul_tflops"] = 2 * n**3 / best_of(lambda: torch.mm(x, y, out=z), device, 10) / 1e12
    out["matmul_size"] = n
    if big:
        out["under_load"] = smi(["clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active"])
    print(json.dumps(out))


if __name__ == "__main__":
    main()
