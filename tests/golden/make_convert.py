"""Makes tests/golden/convert: GGUF files by the gguf package, and what an import must give.

Run: PYTHONPATH=<folder with gguf> .venv/bin/python tests/golden/make_convert.py     (gguf 0.19.0, tokenizers 0.23.3, sentencepiece 0.2.3, transformers 5.17; seed 17)
  types.gguf, types.safetensors   random blocks of every type, and gguf's own float32 values of them
  CASE.gguf, CASE.safetensors, CASE.json   small models of every architecture: tensors by Hugging Face names, config keys, ids of nasty texts
Mappings of experts are tests/bench/to_gguf.py's, which llama.cpp has confirmed (logits within 1e-5); of dense layers those of gguf's own table.
"""
import io
import json
import pathlib
import random
import sys

import gguf
import numpy as np
import sentencepiece
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "bench")]
from make_tokenizer import LLAMA3, NASTY, QWEN2, corpus  # noqa: E402
import to_gguf  # noqa: E402

OUT = HERE / "convert"
VOCAB = 320


def types():
    rng = np.random.default_rng(17)
    writer = gguf.GGUFWriter(OUT / "types.gguf", "test")
    expected = {}
    for name in "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q4_K Q5_K Q6_K".split():
        kind = gguf.GGMLQuantizationType[name]
        values, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (3, 512 // values, size), dtype=np.uint8)  # three rows of 512 values
        halves = {"F32": [], "F16": [0], "BF16": [], "Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}.get(name, [0])
        for at in halves:  # scales: finite
            blocks[:, :, at:at + 2] = rng.normal(size=(3, 512 // values, 1)).astype(np.float16).view(np.uint8).reshape(3, -1, 2)
        if name == "F32":
            blocks = rng.normal(size=(3, 512, 1)).astype(np.float32).view(np.uint8).reshape(3, 512, 4)
        if name == "BF16":
            blocks[:, :, 1] &= 0xBF  # finite
        raw = np.ascontiguousarray(blocks.reshape(3, -1))
        array = raw.view({"F32": np.float32, "F16": np.float16}.get(name, np.uint8))
        writer.add_tensor(name, array, raw_dtype=kind)
        expected[name] = torch.from_numpy(gguf.quants.dequantize(array, kind).astype(np.float32).reshape(3, 512).copy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    save_file(expected, OUT / "types.safetensors")


def byte_level(pre, normalizer=None):
    t = Tokenizer(models.BPE())
    t.normalizer, t.pre_tokenizer, t.decoder = normalizer, pre, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    t.train_from_iterator(corpus(), trainer)
    return t


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
PRE = {
    "smollm": lambda: byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])),
    "gpt-2": lambda: byte_level(GPT2),
    "olmo": lambda: byte_level(GPT2, normalizers.NFC()),
    "llama-bpe": lambda: byte_level(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES])),
    "qwen2": lambda: byte_level(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), BYTES]), normalizers.NFC()),
}


def add_byte_level(writer, pre):
    t = PRE[pre]()
    if pre == "llama-bpe":
        t.model.ignore_merges = True
    j = json.loads(t.to_str())
    vocab = sorted(j["model"]["vocab"], key=j["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocab)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(vocab))])
    writer.add_token_merges([" ".join(m) for m in j["model"]["merges"]])
    writer.add_bos_token_id(1), writer.add_eos_token_id(2), writer.add_pad_token_id(0)
    writer.add_add_bos_token(pre == "llama-bpe")
    writer.add_chat_template("{{ messages[0]['content'] }}")
    return len(vocab), lambda s: t.encode(s, add_special_tokens=False).ids


def add_sentencepiece(writer):
    out = io.BytesIO()
    # Normalisation and spaces as Llama's model has them.
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(corpus()), model_writer=out, model_type="bpe", vocab_size=VOCAB + 180, byte_fallback=True, normalization_rule_name="identity",
                                             remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, unk_id=0, bos_id=1, eos_id=2, minloglevel=2, num_threads=1, character_coverage=0.98)
    sp = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    n = sp.get_piece_size()
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([sp.id_to_piece(i) for i in range(n)])
    writer.add_token_scores([sp.get_score(i) for i in range(n)])
    writer.add_token_types([2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in range(n)])
    writer.add_bos_token_id(1), writer.add_eos_token_id(2), writer.add_unk_token_id(0)
    return n, lambda s: sp.encode(s)


def dense_tensors(weights, config):
    turned, norms = config["model_type"] in ("llama", "mistral"), config["model_type"] == "qwen3"
    yield "token_embd.weight", weights["model.embed_tokens.weight"], True
    yield "output_norm.weight", weights["model.norm.weight"], False
    if not config["tie_word_embeddings"]:
        yield "output.weight", weights["lm_head.weight"], True
    for i in range(config["num_hidden_layers"]):
        layer, out = f"model.layers.{i}.", f"blk.{i}."
        yield from to_gguf.attention_tensors(weights, layer, out, config, turned, norms)
        for site in ("gate", "up", "down"):
            yield out + f"ffn_{site}.weight", weights[layer + f"mlp.{site}_proj.weight"], True


COMMON = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=128, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)
# name: (config class, GGUF architecture, tokenizer, matrices as, config)
CASES = {
    "llama": (transformers.LlamaConfig, "llama", "smollm", "F16", dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=100000.0))),
    "llama_linear": (transformers.LlamaConfig, "llama", "llama-bpe", "F32", dict(tie_word_embeddings=False, rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=500000.0))),
    "mistral": (transformers.MistralConfig, "llama", "gpt-2", "F32", dict(tie_word_embeddings=False, head_dim=16, sliding_window=40, rope_parameters=dict(rope_type="default", rope_theta=10000.0))),
    "mixtral": (transformers.MixtralConfig, "llama", "sentencepiece", "F32",
                dict(num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False, sliding_window=None, rope_parameters=dict(rope_type="default", rope_theta=1000000.0))),
    "qwen3": (transformers.Qwen3Config, "qwen3", "qwen2", "F32", dict(head_dim=24, tie_word_embeddings=True, rms_norm_eps=1e-6, rope_parameters=dict(rope_type="default", rope_theta=1000000.0))),
    "qwen3_moe": (transformers.Qwen3MoeConfig, "qwen3moe", "qwen2", "Q8_0",
                  dict(head_dim=24, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True, tie_word_embeddings=False, rms_norm_eps=1e-6,
                       rope_parameters=dict(rope_type="default", rope_theta=1000000.0))),
    "olmoe": (transformers.OlmoeConfig, "olmoe", "olmo", "BF16",
              dict(num_key_value_heads=4, num_experts=4, num_experts_per_tok=2, norm_topk_prob=False, tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=10000.0))),
}
KEYS = ("model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size moe_intermediate_size max_position_embeddings rms_norm_eps num_experts num_local_experts "
        "num_experts_per_tok norm_topk_prob tie_word_embeddings rope_parameters sliding_window bos_token_id eos_token_id").split()


def case(name, kind, arch, tokenizer, dtype, own):
    writer = gguf.GGUFWriter(OUT / f"{name}.gguf", arch)
    vocab, encode = add_sentencepiece(writer) if tokenizer == "sentencepiece" else add_byte_level(writer, tokenizer)
    config = kind(**{**COMMON, **own, "vocab_size": vocab})
    torch.manual_seed(17)
    model = transformers.AutoModelForCausalLM.from_config(config)
    folder = pathlib.Path("/tmp") / f"make_convert_{name}"
    model.to(torch.bfloat16).save_pretrained(folder)
    j = json.loads((folder / "config.json").read_text())
    weights = to_gguf.Checkpoint(folder)
    p = j.get("rope_parameters")
    writer.add_context_length(j["max_position_embeddings"])
    writer.add_embedding_length(j["hidden_size"]), writer.add_block_count(j["num_hidden_layers"]), writer.add_feed_forward_length(j["intermediate_size"])
    writer.add_head_count(j["num_attention_heads"]), writer.add_head_count_kv(j["num_key_value_heads"])
    if j.get("head_dim"):
        writer.add_key_length(j["head_dim"]), writer.add_value_length(j["head_dim"])
    writer.add_rope_freq_base(p["rope_theta"]), writer.add_layer_norm_rms_eps(j["rms_norm_eps"])
    if p["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR), writer.add_rope_scaling_factor(p["factor"])
    if j.get("sliding_window"):
        writer.add_sliding_window(j["sliding_window"])
    experts = j.get("num_experts") or j.get("num_local_experts")
    if experts:
        writer.add_expert_count(experts), writer.add_expert_used_count(j["num_experts_per_tok"])
    if "moe_intermediate_size" in j:
        writer.add_expert_feed_forward_length(j["moe_intermediate_size"])
    expected = {}
    made = to_gguf.tensors(weights, j, j["model_type"]) if experts else dense_tensors(weights, j)
    for tensor, array, is_matrix in made:
        q = gguf.GGMLQuantizationType[dtype if is_matrix else "F32"]
        writer.add_tensor(tensor, gguf.quants.quantize(np.ascontiguousarray(array), q), raw_dtype=q)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    for tensor in weights.where:
        expected[tensor] = torch.from_numpy(weights[tensor].copy()).to(torch.bfloat16)
    save_file(expected, OUT / f"{name}.safetensors")
    rng = random.Random(17)
    texts = NASTY + ["".join(rng.choice([" ", "  ", "\n", ""]) + rng.choice(NASTY) for _ in range(4)) for _ in range(60)]
    if j["model_type"] == "qwen3_moe" and "num_local_experts" in j:  # two spellings of one field
        j["num_experts"] = j.pop("num_local_experts")
    if tokenizer == "sentencepiece":  # to which the names of its control pieces are text, while Hugging Face adds them as tokens
        texts = [t for t in texts if "<" not in t]
    (OUT / f"{name}.json").write_text(json.dumps({"dtype": dtype, "config": {k: j[k] for k in KEYS if j.get(k) is not None}, "texts": texts, "ids": [encode(t) for t in texts]}))


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    types()
    for name, (kind, arch, tokenizer, dtype, own) in CASES.items():
        case(name, kind, arch, tokenizer, dtype, own)
