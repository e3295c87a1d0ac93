#!/usr/bin/env python3
"""Times a training step of transformers + PEFT: LoRA on all experts, every token labelled; forward, backward, AdamW. Prints one JSON object with the
field names of `moegraft bench step --json`.

    peer_step.py MODEL --batch 4 --seq 512 --dtype bfloat16 --rank 16 [--ids FILE] [--steps 5] [--experts grouped_mm] [--device cuda]

Needs torch, transformers, peft.
"""
import argparse
import json
import statistics
import sys

import peer
import torch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peer.add_arguments(parser)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sites", default="gate,up,down", help="the experts' three always, q k v o as asked for")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--ids", help="safetensors with input_ids int64 [batch, seq] instead of random ids")
    args = parser.parse_args()

    model = peer.add_lora(peer.load(args), args.rank, args.sites.split(",")).train()
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-4)
    ids = peer.load_ids(args.ids, (args.batch, args.seq), model.config.vocab_size).to(args.device)
    limit = peer.matmul_gflops(args.dtype, args.device)
    times, losses = [], []
    for i in range(args.steps):
        start = peer.clock(args.device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(peer.clock(args.device) - start)
        losses.append(loss.item())
        print(f"step {i + 1} of {args.steps}: {times[-1]:.4f} s, loss {losses[-1]:.6f}", file=sys.stderr, flush=True)
    peak = peer.peak_mib(args.device)
    limit = max(limit, peer.matmul_gflops(args.dtype, args.device))
    best = min(times)
    print(json.dumps({"tool": "transformers+peft", "experts": args.experts, "tokens_per_s": ids.numel() / best, "step_s": times, "best_step_s": best,
                      "median_step_s": statistics.median(times), "loss": losses, "peak_mib": peak, "matmul_gflops": limit, **peer.about(args),
                      "batch": ids.shape[0], "seq": ids.shape[1], "rank": args.rank, "sites": args.sites,
                      "trained_parameters": sum(w.numel() for w in model.parameters() if w.requires_grad)}))


if __name__ == "__main__":
    main()
