#!/usr/bin/env python3
"""Loads exports with transformers and PEFT and compares logits with moegraft's.

usage: check_peft.py CASES.json RESULTS.json

CASES: [{"name", "base", "export", "ids", "logits", "vocab_size"}]; ids holds input_ids [B,S], logits the run's with the gate open for every token.
RESULTS: per name {"max_abs", "scale", "off": max |adapter on - off|, "text_off": max |disabled - base| on text logits, "warnings"}.
"""
import json
import sys
import warnings

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def check(case):
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        base = AutoModelForCausalLM.from_pretrained(case["base"], dtype=torch.float32).eval()
        ids = load_file(case["ids"])["input_ids"]
        text = ids % base.config.vocab_size
        text_logits = base(text).logits
        vocab = text_logits.shape[-1]
        base.resize_token_embeddings(case["vocab_size"], mean_resizing=False)
        model = PeftModel.from_pretrained(base, case["export"]).eval()
        logits = model(ids).logits
        with model.disable_adapter():
            off, text_again = model(ids).logits, model(text).logits[..., :vocab]
        expected = load_file(case["logits"])["logits"]
        if logits.shape != expected.shape:
            raise SystemExit(f"{case['name']}: logits {list(logits.shape)} against {list(expected.shape)}")
        return {
            "max_abs": (logits - expected).abs().max().item(),
            "scale": expected.abs().max().item(),
            "off": (logits - off).abs().max().item(),
            "text_off": (text_again - text_logits).abs().max().item(),
            "warnings": sorted({str(w.message).splitlines()[0] for w in caught if not issubclass(w.category, DeprecationWarning)}),
        }


def main():
    torch.set_num_threads(1)
    with open(sys.argv[1]) as f:
        cases = json.load(f)
    results = {case["name"]: check(case) for case in cases}
    with open(sys.argv[2], "w") as f:
        json.dump(results, f, indent=1)


if __name__ == "__main__":
    main()
