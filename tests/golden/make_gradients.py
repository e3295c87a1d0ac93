#!/usr/bin/env python3
"""Golden gradients of whole models: low-rank factors on every projection of the golden base models, and what transformers' backward pass gives them.

    make_gradients.py [MODELS]      (default: tests/golden/model, whose directories it completes; made with torch 2.11.0, transformers 5.17.0, seed 0)

Writes gradients.safetensors per case: for each layer and site, "{l}.{site}.A" [r, in] or [E, r, in], "{l}.{site}.B" [out, r] or [E, out, r] (float32), the
gradients of the mean next-token loss on golden.safetensors' input_ids as "grad.{l}.{site}.A" and ".B", and that loss. The weights are W + SCALE B A, so nothing
but transformers' own modules computes.
"""
import os, sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

MODELS = sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(__file__), "model")
CASES = ["mixtral", "mixtral_window", "olmoe", "olmoe_clip_norm_tied", "qwen3", "qwen3_mixed"]
RANK, SCALE = 3, 5 / 3

for name in CASES:
    torch.manual_seed(0)
    folder = os.path.join(MODELS, name)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager").eval()
    weights, factors = dict(model.named_parameters()), {}

    def delta(site, experts, out, width):
        lead = () if experts is None else (experts,)
        A, B = 0.3 * torch.randn(*lead, RANK, width), 0.3 * torch.randn(*lead, out, RANK)
        factors[f"{site}.A"], factors[f"{site}.B"] = A.requires_grad_(), B.requires_grad_()
        return SCALE * B @ A

    changed = {}
    for l in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{l}."
        for site in "qkvo":
            key = f"{prefix}self_attn.{site}_proj.weight"
            changed[key] = weights[key].detach() + delta(f"{l}.{site}", None, *weights[key].shape)
        key = prefix + "mlp.experts.gate_up_proj"
        if key not in weights:
            continue  # a dense layer
        experts, out, width = weights[key].shape
        changed[key] = weights[key].detach() + torch.cat([delta(f"{l}.{site}", experts, out // 2, width) for site in ("gate", "up")], 1)
        key = prefix + "mlp.experts.down_proj"
        changed[key] = weights[key].detach() + delta(f"{l}.down", *weights[key].shape)
    ids = load_file(os.path.join(folder, "golden.safetensors"))["input_ids"]
    loss = torch.func.functional_call(model, changed, kwargs=dict(input_ids=ids, labels=ids, use_cache=False)).loss
    gradients = torch.autograd.grad(loss, list(factors.values()))
    tensors = {k: v.detach() for k, v in factors.items()} | {f"grad.{k}": g.contiguous() for k, g in zip(factors, gradients)}
    save_file(tensors | {"loss": loss.detach().reshape(1)}, os.path.join(folder, "gradients.safetensors"))
    print(name, float(loss), min(float(g.abs().max()) for g in gradients))
