#!/usr/bin/env python3
"""Writes a random checkpoint of a Qwen3-MoE config.json, shard by shard: the weights of a few layers are drawn on the device, written and forgotten, so that
61 GB pass through a few GB of memory. Names are Hugging Face's, experts fused (gate_up_proj, down_proj).

    make_model.py CONFIG.json OUT [--layers N] [--layers-per-shard 4] [--device cuda] [--dtype bfloat16] [--seed 0] [--set KEY=NUMBER]

Weights are normal with variance 1 / fan-in (1 for the embedding), norms 1: activations keep their size, routing is spread but uneven. Needs torch, safetensors.
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="instead of the config's number")
    parser.add_argument("--layers-per-shard", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=NUMBER", help="another size, e.g. vocab_size=2048")
    args = parser.parse_args()
    config = json.loads(args.config.read_text())
    if config.get("model_type") != "qwen3_moe":
        raise SystemExit(f"make_model: {args.config}: model_type must be qwen3_moe, got {config.get('model_type')}")
    if args.layers:
        config["num_hidden_layers"] = args.layers
    for pair in args.set:
        key, _, value = pair.partition("=")
        if key not in config:
            raise SystemExit(f"make_model: --set {pair}: {args.config} has no {key}")
        config[key] = int(value)
    config["torch_dtype"] = args.dtype
    if config["mlp_only_layers"] or config["decoder_sparse_step"] != 1 or config["tie_word_embeddings"]:
        raise SystemExit("make_model: every layer must have experts, and the head its own weights")

    generator = torch.Generator(device=args.device).manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)

    def normal(*shape, std=None):
        return torch.empty(shape, dtype=dtype, device=args.device).normal_(0.0, std or 1 / math.sqrt(shape[-1]), generator=generator)

    def ones(size):
        return torch.ones(size, dtype=dtype, device=args.device)

    V, D, E, F = (config[k] for k in ("vocab_size", "hidden_size", "num_experts", "moe_intermediate_size"))
    q, kv, C = config["num_attention_heads"] * config["head_dim"], config["num_key_value_heads"] * config["head_dim"], config["head_dim"]

    def layer(i):
        p = f"model.layers.{i}."
        return {
            p + "input_layernorm.weight": ones(D), p + "post_attention_layernorm.weight": ones(D),
            p + "self_attn.q_proj.weight": normal(q, D), p + "self_attn.k_proj.weight": normal(kv, D), p + "self_attn.v_proj.weight": normal(kv, D),
            p + "self_attn.o_proj.weight": normal(D, q), p + "self_attn.q_norm.weight": ones(C), p + "self_attn.k_norm.weight": ones(C),
            p + "mlp.gate.weight": normal(E, D), p + "mlp.experts.gate_up_proj": normal(E, 2 * F, D), p + "mlp.experts.down_proj": normal(E, D, F),
        }

    begin = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    L = config["num_hidden_layers"]
    shards = [range(i, min(L, i + args.layers_per_shard)) for i in range(0, L, args.layers_per_shard)]
    weight_map, total = {}, 0

    def write(index, tensors):
        nonlocal total
        name = f"model-{index + 1:05d}-of-{len(shards) + 1:05d}.safetensors"
        save_file({k: t.cpu() for k, t in tensors.items()}, args.out / name, metadata={"format": "pt"})
        weight_map.update({k: name for k in tensors})
        total += sum(t.nbytes for t in tensors.values())
        print(f"make_model: {name}, {total / 1e9:.2f} GB after {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)

    write(0, {"model.embed_tokens.weight": normal(V, D, std=1.0), "lm_head.weight": normal(V, D), "model.norm.weight": ones(D)})
    for index, layers in enumerate(shards):
        write(index + 1, {k: t for i in layers for k, t in layer(i).items()})
    (args.out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(json.dumps({"tool": "make_model", "layers": L, "bytes": total, "seconds": time.perf_counter() - begin, "device": args.device}))


if __name__ == "__main__":
    main()
