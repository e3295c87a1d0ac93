#!/usr/bin/env python3
"""Writes a Hugging Face MoE checkpoint as GGUF, for llama.cpp.

    to_gguf.py MODEL OUT.gguf [--type bf16|q8_0|f32]

Qwen3-MoE, OLMoE and Mixtral. As llama.cpp's own converter does, norms and routers stay in float32. There is no tokenizer in the file: ids in, ids out.
What llama.cpp would compute differently is refused. Needs gguf, numpy.
"""
import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

TYPES = {"f32": "F32", "bf16": "BF16", "q8_0": "Q8_0"}
ARCHITECTURES = {"qwen3_moe": "qwen3moe", "olmoe": "olmoe", "mixtral": "llama"}


class Checkpoint:
    """Tensors of all safetensors files of a folder as float32 arrays, read when asked for."""

    def __init__(self, folder):
        self.where = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            self.where.update({name: (path, 8 + size, entry) for name, entry in header.items() if name != "__metadata__"})

    def __contains__(self, name):
        return name in self.where

    def __getitem__(self, name):
        path, start, entry = self.where[name]
        kind = {"F32": np.float32, "BF16": np.uint16, "F16": np.float16}[entry["dtype"]]
        begin, end = entry["data_offsets"]
        data = np.fromfile(path, kind, (end - begin) // np.dtype(kind).itemsize, offset=start + begin).reshape(entry["shape"])
        return (data.astype(np.uint32) << 16).view(np.float32) if entry["dtype"] == "BF16" else data.astype(np.float32)


def refuse(condition, why):
    if condition:
        raise SystemExit(f"to_gguf: {why}")


# HF rotates halves of a head, llama.cpp's Llama pairs of neighbours.
def neighbours(weight, heads):
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def attention_tensors(weights, layer, out, config, turned, norms):
    """Attention and both norms of one layer. turned: the rotary halves as neighbours; norms: of query and key."""
    turn = neighbours if turned else lambda weight, heads: weight
    yield out + "attn_norm.weight", weights[layer + "input_layernorm.weight"], False
    yield out + "ffn_norm.weight", weights[layer + "post_attention_layernorm.weight"], False
    yield out + "attn_q.weight", turn(weights[layer + "self_attn.q_proj.weight"], config["num_attention_heads"]), True
    yield out + "attn_k.weight", turn(weights[layer + "self_attn.k_proj.weight"], config["num_key_value_heads"]), True
    yield out + "attn_v.weight", weights[layer + "self_attn.v_proj.weight"], True
    yield out + "attn_output.weight", weights[layer + "self_attn.o_proj.weight"], True
    for side in "qk" if norms else "":
        yield out + f"attn_{side}_norm.weight", weights[layer + f"self_attn.{side}_norm.weight"], False


def tensors(weights, config, family):
    """(name in GGUF, float32 array, is it a matrix of the model's type)"""
    experts = config.get("num_experts") or config.get("num_local_experts")
    yield "token_embd.weight", weights["model.embed_tokens.weight"], True
    yield "output_norm.weight", weights["model.norm.weight"], False
    if "lm_head.weight" in weights and not config.get("tie_word_embeddings"):
        yield "output.weight", weights["lm_head.weight"], True
    elif family == "olmoe":  # llama.cpp's OLMoE wants a matrix of its own
        yield "output.weight", weights["model.embed_tokens.weight"], True
    moe = "block_sparse_moe" if family == "mixtral" else "mlp"
    sites = {"gate": "w1", "up": "w3", "down": "w2"} if family == "mixtral" else {s: s + "_proj" for s in ("gate", "up", "down")}
    for i in range(config["num_hidden_layers"]):
        layer, out = f"model.layers.{i}.", f"blk.{i}."
        yield from attention_tensors(weights, layer, out, config, turned=family == "mixtral", norms=family != "mixtral")
        yield out + "ffn_gate_inp.weight", weights[layer + moe + ".gate.weight"], False
        for site, name in sites.items():
            yield out + f"ffn_{site}_exps.weight", np.stack([weights[f"{layer}{moe}.experts.{e}.{name}.weight"] for e in range(experts)]), True


def convert(folder, path, kind):
    import gguf

    config, weights = json.loads((Path(folder) / "config.json").read_text()), Checkpoint(folder)
    family = config["model_type"]
    refuse(family not in ARCHITECTURES, f"{family}: known are {', '.join(ARCHITECTURES)}")
    rope = config.get("rope_parameters") or {}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"]
    refuse(rope.get("rope_type", "default") != "default" or config.get("rope_scaling"), "scaled rotary embeddings")
    refuse(config.get("sliding_window") and config.get("use_sliding_window", True), "sliding windows")
    refuse(config.get("attention_bias") or config.get("clip_qkv"), "biases or clipping in attention")
    refuse(config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1, "dense layers between sparse ones")
    refuse(family != "mixtral" and bool(config.get("norm_topk_prob")) != (family == "qwen3_moe"), f"norm_topk_prob {config.get('norm_topk_prob')}: llama.cpp's {family} does the other")
    refuse(family == "olmoe" and kv_heads != config["num_attention_heads"], "llama.cpp's OLMoE has as many key as query heads")

    arch = ARCHITECTURES[family]
    # mixtral, olmoe: an expert's width under the name of a dense layer's
    width = config["moe_intermediate_size"] if family == "qwen3_moe" else config["intermediate_size"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(width)
    if family == "qwen3_moe":
        writer.add_expert_feed_forward_length(width)
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta") or config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    of_matrices = gguf.GGMLQuantizationType[TYPES[kind]]
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else "MOSTLY_" + TYPES[kind]])
    for name, array, is_matrix in tensors(weights, config, family):
        dtype = of_matrices if is_matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--type", default="bf16", choices=sorted(TYPES))
    args = parser.parse_args()
    unfinished = args.out + ".part"
    convert(args.model, unfinished, args.type)
    os.replace(unfinished, args.out)
    print(f"{args.out}: {os.path.getsize(args.out) / 2**20:.0f} MiB", file=sys.stderr)


if __name__ == "__main__":
    main()
