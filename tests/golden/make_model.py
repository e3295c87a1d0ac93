#!/usr/bin/env python3
"""Golden base models: tiny random checkpoints of each family with odd options, and transformers' logits on random ids.

    make_model.py [OUT [CASE...]]      (default: tests/golden/model, all cases; made with torch 2.11.0, transformers 5.17.0, seed 0)

Each case is a Hugging Face directory plus golden.safetensors: input_ids int64 [B,S], logits float32 [B,S,V], aux_loss (of models with experts), logits_bf16 (the same model
in bfloat16), all computed by transformers on the CPU with eager attention.
"""
import json, os, sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CONFIG_MAPPING

ONLY = sys.argv[2:]
OUT = sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(__file__), "model")
SMALL = dict(vocab_size=67, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)
DENSE = ("llama", "mistral", "qwen3")
QWEN = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=6, head_dim=6, norm_topk_prob=True)
QWEN2 = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=6, shared_expert_intermediate_size=10)
DOTS = dict(n_routed_experts=5, num_experts_per_tok=2, moe_intermediate_size=6, n_shared_experts=1, head_dim=6, sliding_window=None)
CASES = {
    "olmoe": ("olmoe", dict(num_experts=6, num_experts_per_tok=3)),
    "olmoe_clip_norm_tied": ("olmoe", dict(num_experts=4, num_experts_per_tok=2, clip_qkv=0.4, norm_topk_prob=True, tie_word_embeddings=True, attention_bias=True)),
    "qwen3": ("qwen3_moe", QWEN),
    "qwen3_mixed": ("qwen3_moe", dict(QWEN, num_hidden_layers=4, mlp_only_layers=[1], decoder_sparse_step=2, use_sliding_window=True, sliding_window=3, norm_topk_prob=False, attention_bias=True)),
    "qwen3_yarn": ("qwen3_moe", dict(QWEN, rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16))),
    "mixtral": ("mixtral", dict(num_local_experts=3, num_experts_per_tok=2)),
    "mixtral_window": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=1, sliding_window=4, head_dim=10, num_key_value_heads=1)),
    "mixtral_llama3": ("mixtral", dict(num_local_experts=3, num_experts_per_tok=3, rope_parameters=dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0,
                                       high_freq_factor=4.0, original_max_position_embeddings=16))),
    "llama": ("llama", {}),
    "llama_bias_tied": ("llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, num_key_value_heads=1, head_dim=6)),
    "llama_llama3": ("llama", dict(num_key_value_heads=4, rope_parameters=dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                   original_max_position_embeddings=16))),
    "mistral_window": ("mistral", dict(sliding_window=4, head_dim=10)),
    "mistral_full_tied": ("mistral", dict(sliding_window=None, tie_word_embeddings=True, num_key_value_heads=1)),
    "mistral_yarn": ("mistral", dict(num_attention_heads=2, sliding_window=20, rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16))),
    "qwen3_dense": ("qwen3", dict(head_dim=6)),
    "qwen3_dense_window": ("qwen3", dict(head_dim=10, num_hidden_layers=3, use_sliding_window=True, sliding_window=3, max_window_layers=1, attention_bias=True)),
    "qwen3_dense_tied": ("qwen3", dict(head_dim=4, num_key_value_heads=1, tie_word_embeddings=True, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0))),
    "qwen2_moe": ("qwen2_moe", QWEN2),
    "qwen2_moe_mixed": ("qwen2_moe", dict(QWEN2, num_hidden_layers=4, mlp_only_layers=[2], use_sliding_window=True, sliding_window=3, max_window_layers=3, norm_topk_prob=True)),
    "qwen2_moe_tied": ("qwen2_moe", dict(QWEN2, num_experts_per_tok=1, shared_expert_intermediate_size=5, qkv_bias=False, tie_word_embeddings=True, num_key_value_heads=4)),
    "dots1": ("dots1", DOTS),
    "dots1_groups": ("dots1", dict(DOTS, num_hidden_layers=3, n_routed_experts=6, num_experts_per_tok=3, n_group=3, topk_group=2, first_k_dense_replace=1, n_shared_experts=2,
                                   routed_scaling_factor=2.5, norm_topk_prob=True, sliding_window=3, max_window_layers=1)),
    "dots1_tied": ("dots1", dict(DOTS, num_experts_per_tok=1, tie_word_embeddings=True, attention_bias=True, norm_topk_prob=True, num_key_value_heads=1)),
    "mixtral_linear": ("mixtral", dict(num_local_experts=2, num_experts_per_tok=2, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0))),
}

for name, (family, fields) in CASES.items():
    if ONLY and name not in ONLY:
        continue
    torch.manual_seed(0)
    experts = family not in DENSE
    balanced = experts and family != "dots1"  # has a balance loss
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**SMALL, **fields}), attn_implementation="eager",
                                             **(dict(experts_implementation="eager") if experts else {})).eval()
    with torch.no_grad():  # norms and biases away from 1 and 0, weights large enough that every part shows in the logits
        for w in model.parameters():
            w.add_(0.2 * torch.randn_like(w)) if w.ndim == 1 else w.mul_(12.0)
        for key, w in model.named_buffers():
            if key.endswith("e_score_correction_bias"): w.add_(0.3 * torch.randn_like(w))
    out = os.path.join(OUT, name)
    model.save_pretrained(out, max_shard_size="20KB" if name == "qwen3_mixed" else "1GB")
    ids = torch.randint(3, 67, (2, 11))
    with torch.no_grad():
        result = model(input_ids=ids, use_cache=False, **(dict(output_router_logits=True) if balanced else {}))
        half = model.to(torch.bfloat16)(input_ids=ids, use_cache=False).logits.float()
    golden = {"input_ids": ids, "logits": result.logits.contiguous(), "logits_bf16": half.contiguous()}
    if balanced:
        golden["aux_loss"] = result.aux_loss.reshape(1)
    save_file(golden, os.path.join(out, "golden.safetensors"))
    for extra in ("generation_config.json", "README.md"):
        path = os.path.join(out, extra)
        if os.path.exists(path): os.remove(path)
    print(name, float(result.logits.abs().max()))

if ONLY:
    sys.exit()

# The same model as earlier versions wrote it: other spellings of config fields.
old = os.path.join(OUT, "qwen3_old_spelling")
os.makedirs(old, exist_ok=True)
config = json.load(open(os.path.join(OUT, "qwen3", "config.json")))
config["num_experts"] = config.pop("num_local_experts", None) or config.get("num_experts")
config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
config["rope_scaling"] = None
config["torch_dtype"] = config.pop("dtype", "float32")
json.dump(config, open(os.path.join(old, "config.json"), "w"), indent=1)
for f in ("model.safetensors", "golden.safetensors"):
    save_file(load_file(os.path.join(OUT, "qwen3", f)), os.path.join(old, f))
