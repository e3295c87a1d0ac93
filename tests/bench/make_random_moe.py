#!/usr/bin/env python3
"""Writes a random MoE checkpoint in Hugging Face's layout, for benchmarks.

    make_random_moe.py SHAPE OUT [--seed N] [--dtype float32] [--layers N]

SHAPE is one of the names in SHAPES below. Weights are normal with variance 1/fan-in, so that activations keep their size and routing is spread but
uneven, as in a trained model. Needs torch, transformers.
"""
import argparse
import math
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

COMMON = dict(vocab_size=8192, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=8192,
              tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SHAPES = {
    "fine32": ("qwen3_moe", dict(num_experts=32, num_experts_per_tok=4, moe_intermediate_size=256, head_dim=64, norm_topk_prob=True)),
    "fine64": ("olmoe", dict(num_experts=64, num_experts_per_tok=8, intermediate_size=256)),
    "mix8": ("mixtral", dict(num_local_experts=8, num_experts_per_tok=2, intermediate_size=1024, head_dim=64)),
    # Sizes that no block of a micro-kernel divides.
    "odd48": ("qwen3_moe", dict(hidden_size=448, num_hidden_layers=4, num_attention_heads=7, num_key_value_heads=7, num_experts=48, num_experts_per_tok=6, moe_intermediate_size=224, head_dim=64,
                                norm_topk_prob=True)),
    # SmolLM2-135M with every FFN of 1536 as four shards, each cloned four times: a token's work is that of the dense model.
    "smollm2": ("mixtral", dict(vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, num_local_experts=16, num_experts_per_tok=4,
                                intermediate_size=384, head_dim=64, tie_word_embeddings=True, rope_theta=100000.0)),
    # configs/quickstart/base.yaml
    "quickstart": ("qwen3_moe", dict(vocab_size=2048, hidden_size=192, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2,
                                     moe_intermediate_size=192, head_dim=32, norm_topk_prob=True, max_position_embeddings=512)),
    # llama.cpp knows OLMoE without grouped queries only.
    "mha64": ("olmoe", dict(num_experts=64, num_experts_per_tok=8, intermediate_size=256, num_key_value_heads=8)),
}
TINY = dict(vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
SHAPES["tiny"] = ("qwen3_moe", {**TINY, **dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16, norm_topk_prob=True)})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    args = parser.parse_args()

    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    family, fields = SHAPES[args.shape]
    config = CONFIG_MAPPING[family](**{**COMMON, **fields, **({"num_hidden_layers": args.layers} if args.layers else {})})
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.normal_(1.0, 0.1)
            elif "embed_tokens" in name:
                weight.normal_(0.0, 1.0 / math.sqrt(weight.shape[-1]) if config.tie_word_embeddings else 1.0)
            else:  # [out, in], or [experts, out, in]
                weight.normal_(0.0, 1.0 / math.sqrt(weight.shape[-1]))
    model.to(getattr(torch, args.dtype)).save_pretrained(args.out)
    print(f"{args.out}: {family}, {sum(w.numel() for w in model.parameters()) / 1e6:.1f} M parameters", file=sys.stderr)


if __name__ == "__main__":
    main()
