"""What the peers' scripts share: loading a checkpoint in transformers, LoRA on its experts with PEFT, the clock, memory and the matmul limit."""
import os
import resource
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import AutoModelForCausalLM


def add_arguments(parser):
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--experts", default="grouped_mm", choices=["grouped_mm", "batched_mm", "eager"], help="transformers' implementation of the experts")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")


def load(args):
    if args.threads:
        torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype), attn_implementation="sdpa", experts_implementation=args.experts)
    return model.to(args.device)


def add_lora(model, rank, sites=("gate", "up", "down")):
    """LoRA on the stacked expert matrices of every layer, gate_up_proj and down_proj, and on those of q k v o that are asked for."""
    from peft import LoraConfig, get_peft_model

    targets = sorted({".".join(name.split(".")[-2:]) for name, weight in model.named_parameters() if ".experts." in name and weight.ndim == 3})
    if not targets:
        raise SystemExit("this model holds no stacked experts")
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[s + "_proj" for s in sites if s in "qkvo"], target_parameters=targets))


def random_ids(shape, vocab):
    return torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(0))


def load_ids(path, shape, vocab):
    """int64 [batch, seq] from a safetensors file, or random."""
    if not path:
        return random_ids(shape, vocab)
    from safetensors.torch import load_file

    return load_file(path)["input_ids"]


def clock(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matmul_gflops(dtype, device, size=0):
    n, repeats = size or (2048 if torch.device(device).type == "cpu" else 8192), 5
    x, y = (torch.empty(n, n, dtype=getattr(torch, dtype), device=device).normal_() for _ in range(2))
    z = x @ y
    start = clock(device)
    for _ in range(repeats):
        torch.mm(x, y, out=z)
    return repeats * 2 * n**3 / (clock(device) - start) / 1e9


def about(args):
    """What the figures of any script carry of where and how it ran."""
    return {"dtype": args.dtype, "threads": torch.get_num_threads(), "device": args.device, "cpu_capability": torch.backends.cpu.get_cpu_capability()}


def peak_mib(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
