#!/usr/bin/env python3
"""Times transformers' generate: greedy, cached, exactly N new tokens. Prints one JSON object with the field names of
`moegraft bench generate --json`. Prefill lasts until the first token's logits are there, decode from then until the last one's.

    peer_generate.py MODEL --batch 4 --prompt 128 --tokens 32 --dtype bfloat16 [--ids FILE] [--rank 16] [--rounds 3]

--rank puts LoRA on all experts with PEFT (unmerged); 0 leaves the plain model, what a merged adapter would cost. Needs torch, transformers, peft.
"""
import argparse
import json

import peer
import torch
from transformers import LogitsProcessorList


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peer.add_arguments(parser)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ids", help="safetensors with input_ids int64 [batch, prompt] instead of random prompts")
    args = parser.parse_args()
    if args.tokens < 2:
        parser.error("--tokens must be at least 2")

    model = peer.load(args)
    if args.rank:
        model = peer.add_lora(model, args.rank)
    model.eval()
    ids = peer.load_ids(args.ids, (args.batch, args.prompt), model.config.vocab_size).to(args.device)
    batch, prompt = ids.shape

    class Watch:
        """Called with each new token's logits, which it leaves as they are."""

        def __init__(self):
            self.times = [peer.clock(args.device)]

        def __call__(self, input_ids, scores):
            self.times.append(peer.clock(args.device))
            return scores

    def generate(count):
        watch = Watch()
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True, min_new_tokens=count, max_new_tokens=count, pad_token_id=0,
                                 logits_processor=LogitsProcessorList([watch]))
        return watch.times[1] - watch.times[0], watch.times[-1] - watch.times[1], out[:, prompt:]

    generate(2)
    prefill, decode = [], []
    for _ in range(args.rounds):
        first, rest, out = generate(args.tokens)
        prefill.append(first)
        decode.append(rest)
    print(json.dumps({"tool": "transformers" + ("+peft" if args.rank else ""), "experts": args.experts, "prefill_tokens_per_s": batch * prompt / min(prefill),
                      "decode_tokens_per_s": batch * (args.tokens - 1) / min(decode), "decode_step_ms": 1e3 * min(decode) / (args.tokens - 1), "prefill_s": prefill,
                      "decode_s": decode, "ids": out.tolist(), "peak_mib": peer.peak_mib(args.device), "batch": batch, "prompt": prompt, "new_tokens": args.tokens,
                      "rank": args.rank, **peer.about(args)}))


if __name__ == "__main__":
    main()
