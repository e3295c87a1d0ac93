#!/usr/bin/env python3
"""Golden gradients of whole models: low-rank factors on every projection of the golden base models, new rows of the vocabulary, and what transformers' backward
pass gives them.

    make_gradients.py [MODELS [CASE...]]      (default: tests/golden/model and all cases, whose directories it completes; made with torch 2.11.0, transformers 5.17.0, seed 0)

Writes gradients.safetensors per case (float32 but for the ids): input_ids [B,S], where ids from V on are new rows; "rows.embedding" and "rows.head" [N, D]; for
each layer and site "{l}.{site}.A" [r, in] or [E, r, in] and "{l}.{site}.B" [out, r] or [E, out, r]; and, for gates "open" (the factors act on every token) and
"image" (on new ids alone), "{gate}.loss", the mean over next tokens, each normalised over its own kind's rows, and "{gate}.grad." + each of those names.
A module runs with W on tokens that the gate shuts out and with W + SCALE B A on the others, so nothing but transformers' own modules computes.
"""
import os, sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

MODELS = sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(__file__), "model")
CASES = sys.argv[2:] or ["mixtral", "mixtral_window", "olmoe", "olmoe_clip_norm_tied", "qwen3", "qwen3_mixed", "llama", "llama_bias_tied", "llama_llama3", "mistral_window",
                         "mistral_full_tied", "mistral_yarn", "qwen3_dense", "qwen3_dense_window", "qwen3_dense_tied", "qwen2_moe", "qwen2_moe_mixed", "qwen2_moe_tied",
                         "dots1", "dots1_groups", "dots1_tied"]
RANK, SCALE, NEW = 3, 5 / 3, 7


class Gated(torch.nn.Module):
    """inner, with other weights on the tokens of `on`. Every argument has one row per token."""

    def __init__(self, inner, weights):
        super().__init__()
        self.inner, self.weights, self.on = inner, weights, None

    def forward(self, h, *more):
        rows = [x.reshape(-1, x.shape[-1]) for x in (h, *more)]
        parts = [self.inner(*[x[~self.on] for x in rows]), torch.func.functional_call(self.inner, self.weights(), tuple(x[self.on] for x in rows))]
        out = parts[0].new_zeros(len(self.on), parts[0].shape[-1]).index_put((~self.on,), parts[0]).index_put((self.on,), parts[1])
        return out.reshape(*h.shape[:-1], -1)


for name in CASES:
    torch.manual_seed(0)
    folder = os.path.join(MODELS, name)
    dense = AutoConfig.from_pretrained(folder).model_type in ("llama", "mistral", "qwen3")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **({} if dense else dict(experts_implementation="eager"))).eval().requires_grad_(False)
    leaves, gates = {}, []

    def leaf(key, *shape):
        leaves[key] = (0.3 * torch.randn(shape)).requires_grad_()

    def delta(site):
        return SCALE * leaves[site + ".B"] @ leaves[site + ".A"]

    def gate(parent, child, weights):
        gates.append(Gated(getattr(parent, child), weights))
        setattr(parent, child, gates[-1])

    for l, layer in enumerate(model.model.layers):
        for site in "qkvo":
            inner = getattr(layer.self_attn, site + "_proj")
            out, width = inner.weight.shape
            leaf(f"{l}.{site}.A", RANK, width), leaf(f"{l}.{site}.B", out, RANK)
            gate(layer.self_attn, site + "_proj", lambda inner=inner, key=f"{l}.{site}": {"weight": inner.weight + delta(key)})
        experts = getattr(layer.mlp, "experts", None)
        if dense:
            for site in ("gate", "up", "down"):
                inner = getattr(layer.mlp, site + "_proj")
                out, width = inner.weight.shape
                leaf(f"{l}.{site}.A", RANK, width), leaf(f"{l}.{site}.B", out, RANK)
                gate(layer.mlp, site + "_proj", lambda inner=inner, key=f"{l}.{site}": {"weight": inner.weight + delta(key)})
        if experts is None:
            continue  # a dense layer
        E, D, F = experts.down_proj.shape
        for site, out, width in (("gate", F, D), ("up", F, D), ("down", D, F)):
            leaf(f"{l}.{site}.A", E, RANK, width), leaf(f"{l}.{site}.B", E, out, RANK)
        gate(layer.mlp, "experts", lambda experts=experts, l=l: {"gate_up_proj": experts.gate_up_proj + torch.cat([delta(f"{l}.gate"), delta(f"{l}.up")], 1),
                                                                 "down_proj": experts.down_proj + delta(f"{l}.down")})
    V, D = model.get_input_embeddings().weight.shape
    leaf("rows.embedding", NEW, D), leaf("rows.head", NEW, D)
    ids = load_file(os.path.join(folder, "golden.safetensors"))["input_ids"]
    ids[:, 4:9] = V + torch.randint(NEW, (len(ids), 5))
    tensors = {"input_ids": ids} | {k: w.detach() for k, w in leaves.items()}
    for kind, on in (("open", torch.ones_like(ids, dtype=torch.bool)), ("image", ids >= V)):
        for g in gates:
            g.on = on.reshape(-1)
        embeddings = torch.cat([model.get_input_embeddings().weight, leaves["rows.embedding"]])[ids]
        hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, :-1]
        target, total = ids[:, 1:], 0
        for first, head, of_kind in ((0, model.get_output_embeddings().weight, target < V), (V, leaves["rows.head"], target >= V)):
            total = total + torch.nn.functional.cross_entropy(hidden[of_kind] @ head.T, target[of_kind] - first, reduction="sum")
        loss = total / target.numel()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        tensors |= {f"{kind}.grad.{k}": g.contiguous() for k, g in zip(leaves, gradients)} | {f"{kind}.loss": loss.detach().reshape(1)}
        print(name, kind, float(loss.detach()), min(float(g.abs().max()) for g in gradients))
    save_file(tensors, os.path.join(folder, "gradients.safetensors"))
