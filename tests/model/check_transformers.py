"""Loads each DIR with transformers and prints max |logits - golden| for golden.safetensors beside it; --lenient: tensors that it leaves out or makes anew are no error by
themselves. Used by transformers_test.cpp and checkpoint_semantics_test.cpp."""
import os, sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

lenient = "--lenient" in sys.argv
bad = []
for d in [a for a in sys.argv[1:] if a != "--lenient"]:
    golden = load_file(os.path.join(d, "golden.safetensors"))
    model, info = AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", output_loading_info=True)
    problems = {k: v for k, v in info.items() if v}
    with torch.no_grad():
        logits = model.eval()(input_ids=golden["input_ids"], use_cache=False).logits
    print(f"{d} {(logits - golden['logits']).abs().max().item():.3e} {golden['logits'].abs().max().item():.3e} {problems}")
    if (problems and not lenient) or (logits - golden["logits"]).abs().max() > 1e-4 * max(1.0, golden["logits"].abs().max().item()):
        bad.append(d)
if bad:
    sys.exit(f"transformers disagrees: {bad}")
