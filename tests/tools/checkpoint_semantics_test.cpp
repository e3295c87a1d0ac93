// A checkpoint means what transformers makes of it: directories changed one way each, our logits beside its own, or the line that says why not.
#include <gtest/gtest.h>

#include <fstream>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/decoder.h"
#include "moegraft/tokenizer/tokenizer.h"
#include "support/process.h"
#include "support/python.h"
#include "support/tiny_world.h"

namespace moegraft {
namespace {

namespace fs = std::filesystem;
using io::Json;

void write_model(const fs::path& dir, const std::string& family) {
  model::DecoderSpec s;
  s.family = family;
  s.vocab_size = 61, s.hidden_size = 24, s.num_layers = 2, s.num_heads = 4, s.num_kv_heads = 2, s.head_dim = family == "olmoe" ? 6 : 8;
  s.num_experts = 5, s.num_experts_per_tok = 2, s.intermediate_size = s.moe_intermediate_size = 10;
  s.norm_topk_prob = true, s.max_positions = 64, s.initializer_range = 0.2;
  s.rms_norm_eps = 0.01;       // far from any default: an absent or overlooked value shows
  s.rope.theta = 50.0;
  s.layers.assign(2, {});
  s.qk_norm = family == "olmoe" ? model::QkNorm::full : family == "qwen3_moe" ? model::QkNorm::per_head : model::QkNorm::none;
  model::save_base(model::init_base(s, {1.0, 5}), dir, at::kFloat);
}

struct Checkpoint {
  Json config;
  io::TensorMap tensors;
  fs::path dir;
};

struct Variant {
  std::string name;
  std::function<void(Checkpoint&)> change;
  std::string error;  // ours; empty: logits equal transformers'
};

io::TensorMap renamed(const io::TensorMap& tensors, const std::function<std::string(const std::string&)>& f) {
  io::TensorMap out;
  for (const auto& [name, t] : tensors) out[f(name)] = t;
  return out;
}

std::vector<Variant> variants(const std::string& family) {
  std::vector<Variant> list{
      {"as it is", [](Checkpoint&) {}, ""},
      {"rope in the old spelling", [](Checkpoint& c) { c.config.erase("rope_parameters"); }, ""},
      {"rope in both, the new one counts", [](Checkpoint& c) { c.config["rope_theta"] = 7.0; }, ""},
      {"rope_parameters without theta", [](Checkpoint& c) { c.config["rope_parameters"] = {{"rope_type", "linear"}, {"factor", 2.0}}; }, ""},
      {"rope_scaling of older versions", [](Checkpoint& c) {
         c.config.erase("rope_parameters");
         c.config["rope_scaling"] = {{"type", "linear"}, {"factor", 3.0}};
       }, ""},
      {"tied by the config, a head of its own", [](Checkpoint& c) { c.config["tie_word_embeddings"] = true; }, ""},
      {"tied, the head alone", [](Checkpoint& c) {
         c.config["tie_word_embeddings"] = true;
         c.tensors.erase("model.embed_tokens.weight");
       }, ""},
      {"tied, both and equal", [](Checkpoint& c) {
         c.config["tie_word_embeddings"] = true;
         c.tensors["lm_head.weight"] = c.tensors.at("model.embed_tokens.weight").clone();
       }, ""},
      {"tied, the embedding alone", [](Checkpoint& c) {
         c.config["tie_word_embeddings"] = true;
         c.tensors.erase("lm_head.weight");
       }, ""},
      {"saved without its head's wrapper", [](Checkpoint& c) { c.tensors = renamed(c.tensors, [](const std::string& n) { return n.starts_with("model.") ? n.substr(6) : n; }); }, ""},
      {"tensors that the config does not know", [](Checkpoint& c) {
         c.tensors["model.layers.0.mlp.shared_expert.gate_proj.weight"] = at::ones({3, 24});
         c.tensors["model.rotary_emb.inv_freq"] = at::ones({3});
       }, ""},
      {"an index of other files beside the file", [](Checkpoint& c) { io::write_json(c.dir / "model.safetensors.index.json", {{"metadata", Json::object()}, {"weight_map", {{"lm_head.weight", "gone.safetensors"}}}}); }, ""},
      {"bf16 in the file", [](Checkpoint& c) { for (auto& [name, t] : c.tensors) t = t.to(at::kBFloat16); }, ""},
      {"untied without a head", [](Checkpoint& c) { c.tensors.erase("lm_head.weight"); }, "lm_head.weight is missing"},
      {"a deeper file", [](Checkpoint& c) { c.tensors["model.layers.2.input_layernorm.weight"] = at::ones({24}); }, "belongs to layer 2, but num_hidden_layers in config.json is 2"},
      {"part of another model", [](Checkpoint& c) { c.tensors = renamed(c.tensors, [](const std::string& n) { return "language_model." + n; }); }, "language_model.model.embed_tokens.weight stands for model.embed_tokens.weight"},
      {"a missing layer", [](Checkpoint& c) { c.tensors.erase("model.layers.1.self_attn.q_proj.weight"); }, "model.layers.1.self_attn.q_proj.weight is missing"},
      {"another shape", [](Checkpoint& c) { c.tensors["model.norm.weight"] = at::ones({23}); }, "model.norm.weight must have shape [24], got [23]"},
      {"pickled weights alone", [](Checkpoint& c) {
         c.tensors.clear();
         std::ofstream(c.dir / "pytorch_model.bin") << "x";
       }, "convert it with python"},
      {"eos as text", [](Checkpoint& c) { c.config["eos_token_id"] = "end"; }, "eos_token_id must be an id or a list of ids, got \"end\""},
      {"a number out of range", [](Checkpoint& c) { c.config["vocab_size"] = 4000000000000000000; }, "vocab_size must be positive"},
  };
  // Each field of the config absent: the default of its class, or an error where that cannot be.
  for (const char* key : {"rms_norm_eps", "hidden_act", "attention_bias", "norm_topk_prob", "tie_word_embeddings", "sliding_window", "use_sliding_window", "decoder_sparse_step", "mlp_only_layers", "clip_qkv",
                          "initializer_range", "router_aux_loss_coef", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "architectures", "attention_dropout", "use_cache"})
    list.push_back({std::string("without ") + key, [key](Checkpoint& c) { c.config.erase(key); }, ""});
  list.push_back({"without any rope", [](Checkpoint& c) { c.config.erase("rope_parameters"), c.config.erase("rope_theta"); }, ""});
  for (const char* key : {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts_per_tok"})
    list.push_back({std::string("without ") + key, [key](Checkpoint& c) { c.config.erase(key); }, std::string(key) + " is missing"});
  if (family == "olmoe") list.push_back({"clipped", [](Checkpoint& c) { c.config["clip_qkv"] = 0.1; }, ""});
  return list;
}

TEST(CheckpointSemantics, LogitsAreTransformersOrALineSaysWhy) {
  const std::string python = testing::reference_python(MOEGRAFT_SOURCE_DIR, "torch, transformers, safetensors");
  at::NoGradGuard no_grad;
  testing::TemporaryFolder folder;
  std::vector<std::string> command{python, std::string(MOEGRAFT_SOURCE_DIR) + "/tests/model/check_transformers.py", "--lenient"};
  const at::Tensor ids = at::arange(3, 33).view({2, 15});
  for (const std::string family : {"olmoe", "qwen3_moe", "mixtral"}) {
    const auto good = folder / family;
    write_model(good, family);
    int64_t number = 0;
    for (const auto& v : variants(family)) {
      SCOPED_TRACE(family + ", " + v.name);
      Checkpoint c{io::read_json(good / "config.json"), {}, folder / (family + "-" + std::to_string(number++))};
      for (const auto& [name, t] : io::load_safetensors(good / "model.safetensors")) c.tensors[name] = t.clone();
      fs::create_directories(c.dir);
      v.change(c);
      io::write_json(c.dir / "config.json", c.config);
      if (!c.tensors.empty()) io::save_safetensors(c.dir / "model.safetensors", c.tensors, {{"format", "pt"}});
      try {
        const model::Decoder decoder(model::load_base(c.dir, {at::kFloat, at::kCPU}));
        EXPECT_TRUE(v.error.empty()) << "loaded";
        io::save_safetensors(c.dir / "golden.safetensors", {{"input_ids", ids}, {"logits", decoder.all_logits(decoder.forward(model::pack_rows(ids)).hidden_TD).view({2, 15, -1})}});
        command.push_back(c.dir.string());
      } catch (const UserError& e) {
        EXPECT_FALSE(v.error.empty()) << e.what();
        EXPECT_NE(std::string(e.what()).find(v.error), std::string::npos) << e.what();
      }
    }
  }
  if (python.empty()) GTEST_SKIP() << "no Python with transformers (tools/setup.sh --tests installs one)";
  const auto result = testing::Process(command, {"HF_HUB_OFFLINE=1", "TRANSFORMERS_VERBOSITY=error"}).wait();
  EXPECT_EQ(result.code, 0) << result.out << result.err;
}

TEST(CheckpointSemantics, WhatEndsAText) {
  testing::TemporaryFolder folder;
  write_model(folder.path(), "qwen3_moe");
  struct Case {
    Json config, generation;  // null: the key is absent; a string: the file is
    std::vector<int64_t> expected;
  };
  const Case cases[] = {
      {2, "no file", {2}},        {{2, 23}, "no file", {2, 23}}, {2, {2, 23}, {2, 23}}, {{2, 23}, 2, {2}},
      {2, nullptr, {2}},          {nullptr, 7, {7}},             {nullptr, "no file", {}},
  };
  for (const auto& c : cases) {
    Json config = io::read_json(folder / "config.json");
    config["eos_token_id"] = c.config;
    io::write_json(folder / "config.json", config);
    fs::remove(folder / "generation_config.json");
    if (!c.generation.is_string()) io::write_json(folder / "generation_config.json", {{"eos_token_id", c.generation}});
    EXPECT_EQ(model::read_spec(folder.path()).eos_ids, c.expected) << c.config << " " << c.generation;
  }
}

TEST(CheckpointSemantics, TokensThatOtherFilesName) {
  const std::string python = testing::reference_python(MOEGRAFT_SOURCE_DIR, "transformers");
  if (python.empty()) GTEST_SKIP() << "no Python with transformers (tools/setup.sh --tests installs one)";
  testing::TemporaryFolder folder;
  const auto world = testing::make_tiny_world(folder / "world");
  const auto n = tokenizer::load_tokenizer(world.tokenizer)->size();
  const Json base = io::read_json(world.tokenizer / "tokenizer_config.json");
  const auto token = [](const std::string& content, bool special, bool lstrip = false) {
    return Json{{"content", content}, {"special", special}, {"lstrip", lstrip}, {"rstrip", false}, {"normalized", false}, {"single_word", false}};
  };
  struct Case {
    const char* name;
    Json config;                 // merged into tokenizer_config.json
    std::map<std::string, Json> files;
  };
  const std::vector<Case> cases{
      {"decoder", {{"added_tokens_decoder", {{std::to_string(n), token("<|im_end|>", true)}}}}, {}},
      {"two, strip", {{"added_tokens_decoder", {{std::to_string(n), token("<|a|>", true, true)}, {std::to_string(n + 1), token("<|im_end|>", false)}}}}, {}},
      {"eos that nothing else has", {{"eos_token", "<|im_end|>"}}, {}},
      {"nothing", Json::object(), {}},
  };
  const std::string text = "a red  <|a|> disc <|im_end|> b<|im_end|>";
  for (const auto& c : cases) {
    const auto dir = folder / (std::string("t") + std::to_string(&c - cases.data()));
    fs::create_directories(dir);
    fs::copy_file(world.tokenizer / "tokenizer.json", dir / "tokenizer.json");
    Json config = base;
    config.update(c.config);
    io::write_json(dir / "tokenizer_config.json", config);
    for (const auto& [name, j] : c.files) io::write_json(dir / name, j);
    const auto r = testing::Process({python, "-c", "import sys; from transformers import AutoTokenizer as A; print(*A.from_pretrained(sys.argv[1]).encode(sys.argv[2], add_special_tokens=False))", dir.string(), text},
                                    {"HF_HUB_OFFLINE=1", "TRANSFORMERS_VERBOSITY=error"})
                       .wait();
    ASSERT_EQ(r.code, 0) << r.err;
    std::istringstream in(r.out);
    std::vector<int64_t> expected;
    for (int64_t id; in >> id;) expected.push_back(id);
    EXPECT_EQ(tokenizer::load_tokenizer(dir)->encode(text), expected) << c.name;
  }
}

}  // namespace
}  // namespace moegraft
