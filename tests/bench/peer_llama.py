#!/usr/bin/env python3
"""Times llama.cpp on a GGUF file: greedy, cached, exactly N new tokens. Prints one JSON object with the field names of
`moegraft bench generate --json`. Prefill lasts until the first token's logits are there, decode from then until the last one's.

    peer_llama.py MODEL.gguf --batch 1 --prompt 512 --tokens 64 [--ids FILE] [--rounds 3] [--threads 2]
    peer_llama.py MODEL.gguf --ids FILE --check LOGITS [--exact]

--check: instead of timing, how far its logits are from LOGITS, which `moegraft logits` wrote for the same ids; so that both are known to be the same
model. --exact: keys and values in float32 and no fused attention, for a file in float32. Needs llama-cpp-python, numpy, safetensors.
"""
import argparse
import ctypes
import json
import os
import resource
import time

import llama_cpp as llama
import numpy as np


class Runner:
    def __init__(self, args, batch, positions):
        self.quiet = llama.llama_log_callback(lambda level, text, data: None)  # kept: llama.cpp calls it as long as it lives
        llama.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(args.model.encode(), llama.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {args.model}")
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = batch * positions, batch * positions, batch
        params.n_threads = params.n_threads_batch = args.threads
        if args.exact:
            params.type_k = params.type_v = llama.GGML_TYPE_F32
            params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp cannot make a context of {batch} x {positions} positions")
        self.vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.room = llama.llama_batch_init(batch * positions, 0, 1)

    # Where `wanted` is true the logits are computed.
    def decode(self, ids, positions, sequences, wanted):
        room = self.room
        room.n_tokens = len(ids)
        for i, (token, position, sequence, want) in enumerate(zip(ids, positions, sequences, wanted)):
            room.token[i], room.pos[i], room.n_seq_id[i], room.seq_id[i][0], room.logits[i] = token, position, 1, sequence, want
        if code := llama.llama_decode(self.context, room):
            raise SystemExit(f"llama_decode: {code}")

    def logits(self, i):
        return np.ctypeslib.as_array(llama.llama_get_logits_ith(self.context, i), (self.vocab,))

    def forget(self):
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)

    def generate(self, prompts, count):
        batch, prompt = prompts.shape
        self.forget()
        flat, places, rows = prompts.ravel().tolist(), list(range(prompt)) * batch, np.repeat(np.arange(batch), prompt).tolist()
        last = [p == prompt - 1 for p in places]
        start = time.perf_counter()
        self.decode(flat, places, rows, last)
        ids = [[int(self.logits((b + 1) * prompt - 1).argmax()) for b in range(batch)]]
        first = time.perf_counter()
        while len(ids) < count:
            self.decode(ids[-1], [prompt + len(ids) - 1] * batch, range(batch), [True] * batch)
            ids.append([int(self.logits(b).argmax()) for b in range(batch)])
        return first - start, time.perf_counter() - first, np.array(ids).T.tolist()

    def all_logits(self, ids):
        batch, length = ids.shape
        self.forget()
        self.decode(ids.ravel().tolist(), list(range(length)) * batch, np.repeat(np.arange(batch), length).tolist(), [True] * ids.size)
        return np.stack([self.logits(i) for i in range(ids.size)]).reshape(batch, length, -1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: the cores that this process may use")
    parser.add_argument("--ids", help="safetensors with input_ids int64 [batch, prompt] instead of random prompts")
    parser.add_argument("--check", help="safetensors with float32 logits [batch, prompt, vocab]")
    parser.add_argument("--exact", action="store_true")
    args = parser.parse_args()
    args.threads = args.threads or len(os.sched_getaffinity(0))
    ids = None
    if args.ids:
        from safetensors.numpy import load_file

        ids = load_file(args.ids)["input_ids"]
        args.batch, args.prompt = ids.shape
    runner = Runner(args, args.batch, args.prompt + (0 if args.check else args.tokens))
    about = {"tool": "llama.cpp", "version": llama.__version__, "system": llama.llama_print_system_info().decode().strip(), "threads": args.threads, "batch": args.batch, "prompt": args.prompt}
    if args.check:
        wanted, got = load_file(args.check)["logits"].astype(np.float64), runner.all_logits(ids).astype(np.float64)
        if wanted.shape != got.shape:
            raise SystemExit(f"{args.check}: logits {list(wanted.shape)}, llama.cpp's are {list(got.shape)}")
        error = np.linalg.norm(got - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
        print(json.dumps({**about, "relative_error": float(np.median(error)), "largest_relative_error": float(error.max()), "same_likeliest": float((got.argmax(-1) == wanted.argmax(-1)).mean())}))
        return

    if ids is None:
        ids = np.random.default_rng(0).integers(3, runner.vocab, (args.batch, args.prompt))
    runner.generate(ids, 2)
    prefill, decode = [], []
    for _ in range(args.rounds):
        first, rest, out = runner.generate(ids, args.tokens)
        prefill.append(first)
        decode.append(rest)
    print(json.dumps({**about, "prefill_tokens_per_s": ids.size / min(prefill), "decode_tokens_per_s": args.batch * (args.tokens - 1) / min(decode), "decode_step_ms": 1e3 * min(decode) / (args.tokens - 1),
                      "prefill_s": prefill, "decode_s": decode, "ids": out, "new_tokens": args.tokens, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


if __name__ == "__main__":
    main()
