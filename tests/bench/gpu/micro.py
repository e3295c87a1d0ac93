#!/usr/bin/env python3
"""Decides between kernels before any is written, with what torch has: attention of one packed sequence by each of its backends, and the grouped product of the
experts over tokens and routing. Prints one JSON object.

    micro.py attention [--device cuda] [--tokens 4096] [--heads 32] [--kv-heads 4] [--head-dim 128]
    micro.py grouped   [--device cuda] [--tokens 4096,8192,16384] [--hidden 2048] [--width 768] [--experts 128] [--top-k 8] [--rank 16]

A case that a machine cannot run is kept with its error. Needs torch.
"""
import argparse
import json
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def seconds(run, device, rounds=10):
    for _ in range(2):
        run()
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = float("inf")
    for _ in range(rounds):
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return best


def case(row, run, flops, device):
    try:
        s = seconds(run, device)
        row.update(ms=1e3 * s, tflops=flops / s / 1e12)
    except Exception as e:
        row["error"] = f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def attention(a):
    """Causal, grouped queries, one sequence. Backward: 2.5 times the forward's products."""
    T, H, G, C = a.tokens[0], a.heads, a.kv_heads, a.head_dim
    draw = lambda heads: torch.randn(1, heads, T, C, device=a.device, dtype=torch.bfloat16, requires_grad=True)
    q, k, v = draw(H), draw(G), draw(G)
    grad = torch.randn_like(q)
    forward_flops = 4 * H * C * T * (T + 1) / 2
    rows = []
    for backend, deterministic in (("FLASH_ATTENTION", False), ("FLASH_ATTENTION", True), ("CUDNN_ATTENTION", False), ("CUDNN_ATTENTION", True), ("MATH", False)):
        if backend == "MATH" and a.device == "cuda":
            continue  # the CPU's dry run alone: [32, 4096, 4096] scores tell nothing here
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        with sdpa_kernel(getattr(SDPBackend, backend)):
            run = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)
            both = lambda: torch.autograd.grad(run(), (q, k, v), grad)
            rows.append(case({"backend": backend, "deterministic": deterministic, "pass": "forward"}, lambda: run().detach(), forward_flops, a.device))
            rows.append(case({"backend": backend, "deterministic": deterministic, "pass": "forward + backward"}, both, 3.5 * forward_flops, a.device))
    torch.use_deterministic_algorithms(False)
    return {"shape": {"tokens": T, "heads": H, "kv_heads": G, "head_dim": C}, "cases": rows}


def offsets(T, E, K, kind, device):
    """Inclusive ends of the experts' rows: balanced, or by random routers of uneven popularity."""
    if kind == "balanced":
        counts = torch.full((E,), T * K // E)
    else:
        logits = torch.randn(T, E, generator=torch.Generator().manual_seed(1)) + 0.7 * torch.randn(E, generator=torch.Generator().manual_seed(2))
        counts = torch.bincount(logits.topk(K, -1).indices.reshape(-1), minlength=E)
    return counts.cumsum(0).to(torch.int32).to(device), int(counts.sum())


def grouped(a):
    D, F, E, K, P = a.hidden, a.width, a.experts, a.top_k, a.rank
    draw = lambda *shape: torch.randn(*shape, device=a.device).to(torch.bfloat16)
    # Stored [out, in] as the model has them, and multiplied from the right.
    weights = {"gate and up": draw(E, 2 * F, D), "down": draw(E, D, F), "A of gate and up": draw(E, 2 * P, D), "A of one": draw(E, P, D), "B of one": draw(E, F, P)}
    rows = []
    for T in a.tokens:
        for kind in ("balanced", "routed"):
            ends, R = offsets(T, E, K, kind, a.device)
            for name, w in weights.items():
                x = draw(R, w.shape[2])
                row = {"product": name, "tokens": T, "routing": kind, "rows": R, "shape": list(w.shape)}
                rows.append(case(row, lambda: torch._grouped_mm(x, w.transpose(1, 2), offs=ends), 2 * R * w.shape[1] * w.shape[2], a.device))
            x, y = draw(R, D), draw(R, F)  # a factor's gradient: contraction over the rows
            rows.append(case({"product": "gradient [D, R] x [R, F]", "tokens": T, "routing": kind, "rows": R}, lambda: torch._grouped_mm(x.t(), y, offs=ends), 2 * R * D * F, a.device))
    return {"shape": {"hidden": D, "width": F, "experts": E, "top_k": K, "rank": P}, "cases": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["attention", "grouped"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tokens", default="4096", type=lambda text: [int(t) for t in text.split(",")])
    for name, value in dict(heads=32, kv_heads=4, head_dim=128, hidden=2048, width=768, experts=128, top_k=8, rank=16).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    args = parser.parse_args()
    torch.manual_seed(0)
    out = attention(args) if args.what == "attention" else grouped(args)
    print(json.dumps({"tool": "micro", "what": args.what, "device": args.device, "torch": torch.__version__, "name": torch.cuda.get_device_name() if args.device == "cuda" else "cpu", **out}))


if __name__ == "__main__":
    main()
