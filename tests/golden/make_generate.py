"""Golden values for tests/generate from transformers' logits processors. Run: python tests/golden/make_generate.py  (torch 2.11.0, transformers 5.17.0)

Writes tests/golden/generate/sampling.txt: per case a line "temperature top_k top_p V", the logits, and softmax(processors(logits)) in float64.
Half of the cases hold ties that top-k must keep; top-p never ends inside a tie (which of equals survives is not specified there).
"""
import pathlib

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

OUT = pathlib.Path(__file__).parent / "generate" / "sampling.txt"
OUT.parent.mkdir(exist_ok=True)
generator = torch.Generator().manual_seed(7)
lines = []
for i, (temperature, top_k, top_p) in enumerate(
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.9), (0.5, 8, 0.8), (2.0, 3, 0.5), (1.3, 100, 0.95), (0.1, 4, 0.99), (1.0, 1, 0.3), (1.0, 0, 0.01)]
):
    logits = torch.randn(1, 40, generator=generator) * 3
    if i % 2 and top_p == 1.0 or top_k == 5:
        logits = (logits * 2).round() / 2
    chain = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p))
    probs = chain(torch.zeros(1, 1, dtype=torch.long), logits.clone()).double().softmax(-1)[0]
    lines.append(f"{temperature} {top_k} {top_p} {logits.shape[1]}")
    lines.append(" ".join(repr(float(v)) for v in logits[0]))
    lines.append(" ".join(repr(float(v)) for v in probs))
OUT.write_text("\n".join(lines) + "\n")
