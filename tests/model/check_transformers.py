"""Loads DIR with transformers and prints max |logits - golden| for golden.safetensors beside it. Used by transformers_test.cpp."""
import os, sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

for d in sys.argv[1:]:
    golden = load_file(os.path.join(d, "golden.safetensors"))
    model, info = AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", output_loading_info=True)
    problems = {k: v for k, v in info.items() if v}
    with torch.no_grad():
        logits = model.eval()(input_ids=golden["input_ids"], use_cache=False).logits
    print(f"{d} {(logits - golden['logits']).abs().max().item():.3e} {golden['logits'].abs().max().item():.3e} {problems}")
    if problems or (logits - golden["logits"]).abs().max() > 1e-4 * max(1.0, golden["logits"].abs().max().item()):
        sys.exit(f"{d}: transformers disagrees")
