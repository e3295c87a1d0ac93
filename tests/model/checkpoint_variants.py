"""Writes OUT/NAME for every row of the tables below: a tiny checkpoint changed in one way, and what transformers makes of it, in golden.safetensors (logits) or
golden.json (ids of texts). OUT/cases.json lists them for checkpoint_variants_test.cpp."""
import copy, json, os, shutil, sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CONFIG_MAPPING
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
OUT, TOKENIZER = sys.argv[1:3]
SIZES = dict(vocab_size=61, hidden_size=24, intermediate_size=10, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             num_experts_per_tok=2, initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
FAMILIES = {"qwen3_moe": dict(num_experts=5, moe_intermediate_size=10, head_dim=8, norm_topk_prob=True),
            "olmoe": dict(num_experts=5, norm_topk_prob=True, clip_qkv=0.5), "mixtral": dict(num_local_experts=5, head_dim=8)}
EXPERTS = {"qwen3_moe": ("num_experts", "num_local_experts"), "olmoe": ("num_experts", "num_local_experts"), "mixtral": ("num_local_experts", "num_experts")}


# An edit changes the config and the tensors in place and may write files itself (then it returns True).
def put(**fields): return lambda c, t, d: c.update(fields)
def drop(*keys): return lambda c, t, d: [c.pop(k, None) for k in keys] and None
def both(*edits): return lambda c, t, d: any([e(c, t, d) for e in edits])
def rename(change): return lambda c, t, d: (lambda new: (t.clear(), t.update(new)) and None)({change(k): v for k, v in t.items()})
def own_head(c, t, d): t["lm_head.weight"] = torch.flip(t["model.embed_tokens.weight"], [0]).clone()
def same_head(c, t, d): t["lm_head.weight"] = t["model.embed_tokens.weight"].clone()
def without(*names): return lambda c, t, d: [t.pop(n, None) for n in names] and None
def extra(*names): return lambda c, t, d: t.update({n: torch.ones(3) for n in names})
def bare(k): return k.removeprefix("model.")
def cut(parts, place=lambda name, i: i):
    def edit(c, t, d):
        names, where = sorted(t), {}
        files = [{} for _ in range(parts)]
        for n, k in enumerate(names):
            files[n % parts][k] = t[k]
            where[k] = f"model-{place(k, n % parts) + 1:05}-of-{parts:05}.safetensors"
        for i, f in enumerate(files): save_file(f, f"{d}/model-{i + 1:05}-of-{parts:05}.safetensors", {"format": "pt"})
        json.dump({"metadata": {}, "weight_map": where}, open(d + "/model.safetensors.index.json", "w"))
        return True
    return edit
def single_and_shards(c, t, d):
    cut(2)(c, {k: v * 2 for k, v in t.items()}, d)
def unlisted(c, t, d):  # the index leaves some names out, the files do not
    cut(2)(c, t, d)
    j = json.load(open(d + "/model.safetensors.index.json"))
    del j["weight_map"]["model.norm.weight"]
    json.dump(j, open(d + "/model.safetensors.index.json", "w"))
    return True
def twice(c, t, d):  # two shards hold a tensor, with other values
    cut(2)(c, t, d)
    for i, factor in ((1, 1.0), (2, 2.0)):
        f = load_file(f"{d}/model-0000{i}-of-00002.safetensors")
        save_file({**f, "model.norm.weight": t["model.norm.weight"] * factor}, f"{d}/model-0000{i}-of-00002.safetensors", {"format": "pt"})
    return True
def pickled(c, t, d): torch.save(t, d + "/pytorch_model.bin"); return True
def fused(block):
    def edit(c, t, d):
        for l in range(c["num_hidden_layers"]):
            for e in range(5):
                p = f"model.layers.{l}.{block}.experts.{e}."
                for n in ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"): t.setdefault(p + n + ".weight", None)
            p = f"model.layers.{l}.{block}.experts."
            get = lambda *names: torch.stack([torch.cat([next(t[f"{p}{e}.{n}.weight"] for n in alt.split("|") if t[f"{p}{e}.{n}.weight"] is not None) for alt in names]) for e in range(5)])
            gate_up, down = get("gate_proj|w1", "up_proj|w3"), get("down_proj|w2")
            for k in [k for k in t if k.startswith(p)]: del t[k]
            t[f"model.layers.{l}.mlp.experts.gate_up_proj"], t[f"model.layers.{l}.mlp.experts.down_proj"] = gate_up, down
            if block != "mlp": t[f"model.layers.{l}.mlp.gate.weight"] = t.pop(f"model.layers.{l}.{block}.gate.weight")
    return edit


THETA = {"rope_theta": 5000.0, "rope_type": "default"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 777.0}
# name, edit, and for ours: "" the same logits, "warning: TEXT" the same logits and this line, "error: TEXT".
ALL = [
    ("as_written", put(), ""),
    ("rope_absent", drop("rope_parameters"), ""),
    ("rope_theta_outside", both(drop("rope_parameters"), put(rope_theta=5000.0)), ""),
    ("rope_theta_inside", put(rope_parameters=THETA), ""),
    ("rope_theta_both", put(rope_parameters=THETA, rope_theta=99.0), ""),
    ("rope_parameters_without_theta", put(rope_parameters={"rope_type": "default"}, rope_theta=99.0), ""),
    ("rope_parameters_without_any_theta", put(rope_parameters={"rope_type": "default"}), ""),
    ("rope_scaling_old_key", both(drop("rope_parameters"), put(rope_scaling={"type": "linear", "factor": 3.0}, rope_theta=5000.0)), ""),
    ("rope_scaling_and_parameters", put(rope_scaling=YARN, rope_parameters=THETA), ""),
    ("rope_scaling_empty", put(rope_scaling={}, rope_parameters=THETA), ""),
    ("rope_scaling_null", put(rope_scaling=None, rope_parameters=THETA), ""),
    ("yarn_without_original_length", put(rope_parameters={k: v for k, v in YARN.items() if k[0] != "o"}), ""),
    ("llama3", put(rope_parameters={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 777.0}), ""),
    ("rms_norm_eps_absent", drop("rms_norm_eps"), ""),
    ("hidden_act_absent", drop("hidden_act"), ""),
    ("hidden_act_swish", put(hidden_act="swish"), ""),
    ("hidden_act_gelu", put(hidden_act="gelu"), "error: hidden_act 'gelu' is not supported"),
    ("norm_topk_prob_absent", drop("norm_topk_prob"), ""),
    ("norm_topk_prob_false", put(norm_topk_prob=False), ""),
    ("initializer_range_absent", drop("initializer_range"), ""),
    ("ids_absent", drop("bos_token_id", "eos_token_id", "pad_token_id"), ""),
    ("eos_list", put(eos_token_id=[2, 23]), ""),
    ("torch_dtype", both(drop("dtype"), put(torch_dtype="bfloat16")), ""),
    ("sliding_window", put(sliding_window=4, use_sliding_window=True), ""),
    ("sliding_window_not_used", put(sliding_window=4, use_sliding_window=False), ""),
    ("tie_absent", drop("tie_word_embeddings"), ""),
    ("tied_own_head", both(put(tie_word_embeddings=True), own_head), "warning: tie_word_embeddings is true in config.json, but lm_head.weight differs"),
    ("tied_same_head", both(put(tie_word_embeddings=True), same_head), ""),
    ("tied_without_head", both(put(tie_word_embeddings=True), without("lm_head.weight")), ""),
    ("tied_head_alone", both(put(tie_word_embeddings=True), without("model.embed_tokens.weight")), ""),
    ("untied_without_head", without("lm_head.weight"), "error: lm_head.weight is missing"),
    ("tensor_missing", without("model.norm.weight"), "error: model.norm.weight is missing"),
    ("extra_tensors", extra("model.layers.0.mlp.shared_expert.up_proj.weight", "visual.a", "visual.b", "visual.c", "visual.d"), "warning: 5 tensors that the model does not have are not used"),
    ("inv_freq", extra("model.layers.0.self_attn.rotary_emb.inv_freq"), ""),
    ("deeper_than_config", extra("model.layers.2.mlp.gate.weight"), "error: model.layers.2.mlp.gate.weight lies beyond num_hidden_layers 2"),
    ("fewer_layers_in_config", put(num_hidden_layers=1), "error: lies beyond num_hidden_layers 1"),
    ("more_layers_in_config", put(num_hidden_layers=3), "error: model.layers.2.input_layernorm.weight is missing"),
    ("no_prefix", rename(bare), ""),
    ("prefix_on_head", rename(lambda k: "model." + k if k == "lm_head.weight" else k), ""),
    ("wrapper_prefix", rename(lambda k: "language_model." + k), "error: the file's names begin with 'language_model.model.'"),
    ("wrapper_prefix_inside", rename(lambda k: k.replace("model.", "model.language_model.")), "error: the file's names begin with 'model.language_model.'"),
    ("shards", cut(3), ""),
    ("shards_and_single", single_and_shards, "warning: the single file is read"),
    ("shards_unlisted_tensor", unlisted, ""),
    ("shards_listed_elsewhere", cut(2, lambda name, i: 1 - i), ""),
    ("shards_twice", twice, ""),
    ("pytorch_model_alone", pickled, "error: holds pytorch_model.bin only"),
]
ONLY = {
    "qwen3_moe": [("fused", fused("mlp"), ""), ("dense_layer_absent_fields", drop("mlp_only_layers", "decoder_sparse_step", "attention_bias"), "")],
    "olmoe": [("fused", fused("mlp"), ""), ("kv_heads_null_is_all", both(put(num_key_value_heads=None, num_attention_heads=2, head_dim=12), lambda c, t, d: [t.update({k: v.repeat(2, *[1] * (v.dim() - 1))}) for k, v in list(t.items()) if ".k_" in k or ".v_" in k] and None), ""),
              ("clip_absent", drop("clip_qkv", "attention_bias"), "")],
    "mixtral": [("fused", fused("block_sparse_moe"), ""), ("mlp_names", rename(lambda k: k.replace(".block_sparse_moe.", ".mlp.")), "")],
}


def experts_rows(family):
    mine, other = EXPERTS[family]
    wrong = {mine: 4, other: 5}
    return [("experts_" + mine, both(drop(mine, other), put(**{mine: 5})), ""), ("experts_" + other, both(drop(mine, other), put(**{other: 5})), ""),
            ("experts_in_both", both(drop(mine, other), put(**wrong)), "")]


def logits(d, ids):
    model = AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits.contiguous()


def token(content, **flags): return dict(dict(content=content, lstrip=False, rstrip=False, normalized=False, single_word=False, special=True), **flags)


SIZE = 1 + max(json.load(open(TOKENIZER + "/tokenizer.json"))["model"]["vocab"].values())
BASE = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
TOKENS = [  # name, tokenizer_config.json, other files
    ("plain", BASE, {}),
    ("decoder", {**BASE, "added_tokens_decoder": {str(SIZE): token("<|im_end|>")}}, {}),
    ("decoder_two_out_of_order", {**BASE, "added_tokens_decoder": {str(SIZE + 1): token("<b>"), str(SIZE): token("<a>", special=False, normalized=True)}}, {}),
    ("decoder_gap", {**BASE, "added_tokens_decoder": {str(SIZE + 5): token("<|im_end|>")}}, {}),
    ("decoder_flags", {**BASE, "added_tokens_decoder": {str(SIZE): token("<|im_end|>", lstrip=True, rstrip=True, special=False)}}, {}),
    ("decoder_changes_flags", {**BASE, "added_tokens_decoder": {"2": token("</s>", lstrip=True)}}, {}),
    ("decoder_and_added_tokens", {**BASE, "added_tokens_decoder": {str(SIZE): token("<|im_end|>")}}, {"added_tokens.json": {"<a>": SIZE}}),
    ("added_tokens", BASE, {"added_tokens.json": {"<|im_end|>": SIZE, "<a>": SIZE + 1}}),
    ("named_only", {**BASE, "pad_token": "<|im_end|>"}, {}),
    ("named_in_map", BASE, {"special_tokens_map.json": {"pad_token": "<|im_end|>"}}),
    ("additional", {**BASE, "additional_special_tokens": ["<a>", "<b>"]}, {}),
    ("eos_is_added", {**BASE, "eos_token": "<|im_end|>", "added_tokens_decoder": {str(SIZE): token("<|im_end|>")}}, {}),
]
TEXTS = ["a <|im_end|> b", "<a><b> x <b>", "</s> a </s>b", "a  <|im_end|>  <a>b"]

cases = []
torch.manual_seed(0)
ids = torch.arange(3, 33).view(2, 15)
for family, fields in FAMILIES.items():
    base = f"{OUT}/{family}"
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**SIZES, **fields}))
    with torch.no_grad():
        for w in model.parameters():
            w.add_(0.1 * torch.randn_like(w))
    model.save_pretrained(base)
    config, tensors = json.load(open(base + "/config.json")), load_file(base + "/model.safetensors")
    for name, edit, expected in ALL + ONLY[family] + experts_rows(family):
        d = f"{base}-{name}"
        os.makedirs(d)
        c, t = copy.deepcopy(config), dict(tensors)
        if not edit(c, t, d):
            save_file({k: v.contiguous().clone() for k, v in t.items()}, d + "/model.safetensors", {"format": "pt"})
        json.dump(c, open(d + "/config.json", "w"))
        case = {"dir": d, "expected": expected}
        if not expected.startswith("error"):
            try:
                save_file({"input_ids": ids, "logits": logits(d, ids)}, d + "/golden.safetensors")
            except Exception as e:
                case["refused"] = f"{type(e).__name__}: {str(e)[:300]}"
        cases.append(case)
tokens = []
for name, config, files in TOKENS:
    d = f"{OUT}/tokens-{name}"
    os.makedirs(d)
    shutil.copy(TOKENIZER + "/tokenizer.json", d)
    for file, content in {"tokenizer_config.json": config, **files}.items():
        json.dump(content, open(f"{d}/{file}", "w"))
    t = AutoTokenizer.from_pretrained(d)
    tokens.append({"dir": d, "texts": TEXTS, "ids": [t.encode(x, add_special_tokens=False) for x in TEXTS], "decoded": [t.decode(t.encode(x, add_special_tokens=False), skip_special_tokens=True) for x in TEXTS], "size": len(t)})
defaults = []  # config.json with model_type alone
for family in FAMILIES:
    d = f"{OUT}/defaults-{family}"
    os.makedirs(d)
    json.dump({"model_type": family}, open(d + "/config.json", "w"))
    c = CONFIG_MAPPING[family]()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_experts", "num_experts_per_tok",
             "max_position_embeddings", "rms_norm_eps", "initializer_range", "router_aux_loss_coef", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    defaults.append({"dir": d, "fields": {n: getattr(c, n) for n in names}, "moe_width": getattr(c, "moe_intermediate_size", c.intermediate_size), "rope_theta": c.rope_parameters["rope_theta"],
                     "norm_topk_prob": getattr(c, "norm_topk_prob", True), "sliding_window": getattr(c, "sliding_window", None) or 0})
json.dump({"logits": cases, "tokens": tokens, "defaults": defaults}, open(OUT + "/cases.json", "w"))
