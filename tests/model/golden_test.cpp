// Every family against transformers, on the checkpoints of tests/golden/make_model.py.
#include <gtest/gtest.h>

#include <filesystem>

#include "../support/paths.h"
#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/decoder.h"

namespace moegraft::model {
namespace {

namespace fs = std::filesystem;
const fs::path kGolden = fs::path(test_source_dir()) / "tests/golden/model";

double distance(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

class Golden : public testing::TestWithParam<const char*> {};

TEST_P(Golden, LogitsAndBalanceLossEqualTransformers) {
  at::NoGradGuard no_grad;
  const fs::path dir = kGolden / GetParam();
  const auto golden = io::load_safetensors(dir / "golden.safetensors");
  const Decoder decoder(load_base(dir));
  ForwardOptions options;
  options.aux_loss = true;
  const PackedBatch batch = pack_rows(golden.at("input_ids"));
  const auto result = decoder.forward(batch, options);
  const at::Tensor expected = golden.at("logits"), logits = decoder.all_logits(result.hidden_TD).view(expected.sizes());
  EXPECT_GT(expected.abs().max().item<double>(), 0.5);
  EXPECT_LT(distance(logits, expected), 1e-4 * std::max(1.0, expected.abs().max().item<double>()));
  EXPECT_EQ(result.aux_loss.defined(), decoder.spec().has_experts());
  if (golden.contains("aux_loss"))
    EXPECT_NEAR(result.aux_loss.item<double>(), golden.at("aux_loss").item<double>(), 1e-5);
}

TEST_P(Golden, Bfloat16IsNoFurtherFromFloat32ThanTransformers) {
  at::NoGradGuard no_grad;
  const fs::path dir = kGolden / GetParam();
  const auto golden = io::load_safetensors(dir / "golden.safetensors");
  const Decoder decoder(load_base(dir, {at::kBFloat16, at::kCPU}));
  const at::Tensor expected = golden.at("logits"),
                   logits = decoder.all_logits(decoder.forward(pack_rows(golden.at("input_ids"))).hidden_TD)
                                .view(expected.sizes());
  // Mean distance: a rounding that flips one top-k choice moves a single position's logits as a whole, in either
  // implementation.
  const auto mean = [&](const at::Tensor& x) { return (x - expected).abs().mean().item<double>(); };
  EXPECT_LE(mean(logits), 2 * mean(golden.at("logits_bf16")) + 1e-3);
}

TEST_P(Golden, DecodingWithACacheContinuesTheSameLogits) {
  at::NoGradGuard no_grad;
  const fs::path dir = kGolden / GetParam();
  const auto golden = io::load_safetensors(dir / "golden.safetensors");
  const Decoder decoder(load_base(dir));
  const at::Tensor ids = golden.at("input_ids"), expected = golden.at("logits");
  KvCache cache(decoder.spec(), 2, 11, at::kFloat, at::kCPU);
  ForwardOptions options;
  options.cache = &cache;
  for (int64_t s = 0; s < 11;) {
    const int64_t count = s == 0 ? 4 : 1;
    PackedBatch batch = pack_rows(ids.narrow(1, s, count));
    batch.positions_T = batch.positions_T + s;
    const at::Tensor logits = decoder.all_logits(decoder.forward(batch, options).hidden_TD).view({2, count, -1});
    EXPECT_LT(distance(logits, expected.narrow(1, s, count)), 1e-4 * std::max(1.0, expected.abs().max().item<double>()))
        << "position " << s;
    s += count;
  }
}

TEST_P(Golden, WritesADirectoryThatReadsBackTheSame) {
  at::NoGradGuard no_grad;
  const fs::path dir = kGolden / GetParam(),
                 copy = fs::path(testing::TempDir()) / ("moegraft-save-" + std::string(GetParam()));
  const Decoder before(load_base(dir));
  save_base(before.base(), copy, at::kFloat, 8000);
  const Decoder after(load_base(copy));
  const PackedBatch batch = pack_rows(io::load_safetensors(dir / "golden.safetensors").at("input_ids"));
  EXPECT_TRUE(at::equal(before.forward(batch).hidden_TD, after.forward(batch).hidden_TD));
  fs::remove_all(copy);
}

INSTANTIATE_TEST_SUITE_P(Families, Golden,
                         testing::Values("olmoe", "olmoe_clip_norm_tied", "qwen3", "qwen3_mixed", "qwen3_yarn",
                                         "qwen3_old_spelling", "mixtral", "mixtral_window", "mixtral_llama3",
                                         "mixtral_linear", "llama", "llama_bias_tied", "llama_llama3", "mistral_window",
                                         "mistral_full_tied", "mistral_yarn", "qwen3_dense", "qwen3_dense_window",
                                         "qwen3_dense_tied", "qwen2_moe", "qwen2_moe_mixed", "qwen2_moe_tied", "dots1",
                                         "dots1_groups", "dots1_tied"),
                         [](const auto& info) { return std::string(info.param); });

TEST(Packed, SequencesDoNotSeeEachOther) {
  at::NoGradGuard no_grad;
  const Decoder decoder(load_base(kGolden / "qwen3"));
  const at::Tensor ids = at::arange(3, 20);
  PackedBatch packed;
  packed.ids_T = ids;
  packed.cu_seqlens = {0, 5, 6, 17};
  packed.positions_T = at::cat({at::arange(5), at::arange(1), at::arange(11)});
  const at::Tensor whole = decoder.forward(packed).hidden_TD;
  const at::Tensor last = decoder.forward(pack_rows(ids.narrow(0, 6, 11).unsqueeze(0))).hidden_TD;
  EXPECT_LT(distance(whole.narrow(0, 6, 11), last), 1e-5);
}

// A copy of a golden directory to damage.
struct Copy {
  fs::path dir = fs::path(testing::TempDir()) / "moegraft-bad-model";
  Copy(const char* name) {
    fs::remove_all(dir);
    fs::copy(kGolden / name, dir, fs::copy_options::recursive);
  }
  ~Copy() { fs::remove_all(dir); }
  std::string error() const {
    try {
      load_base(dir);
    } catch (const UserError& e) { return e.what(); }
    return "";
  }
  void edit(const std::function<void(io::Json&)>& change) {
    io::Json j = io::read_json(dir / "config.json");
    change(j);
    io::write_json(dir / "config.json", j);
  }
};

TEST(BadModel, EachProblemIsNamed) {
  {
    Copy c("qwen3");
    c.edit([](io::Json& j) { j["model_type"] = "gpt2"; });
    EXPECT_NE(c.error().find("'gpt2' is not a supported family; supported: dots1, llama, mistral, mixtral, olmoe, "
                             "qwen2_moe, qwen3, qwen3_moe"),
              std::string::npos)
        << c.error();
  }
  {
    Copy c("qwen3");
    c.edit([](io::Json& j) { j["moe_intermediate_size"] = 7; });
    EXPECT_NE(c.error().find("model.layers.0.mlp.experts.0.gate_proj.weight must have shape [7, 16], got [6, 16]"),
              std::string::npos)
        << c.error();
  }
  {
    Copy c("qwen3");
    c.edit([](io::Json& j) { j["num_attention_heads"] = 3; });
    EXPECT_NE(c.error().find("must be a multiple of num_key_value_heads"), std::string::npos) << c.error();
  }
  {
    Copy c("qwen3");
    c.edit([](io::Json& j) { j["num_hidden_layers"] = 3; });
    EXPECT_NE(c.error().find("model.layers.2.input_layernorm.weight is missing"), std::string::npos) << c.error();
    EXPECT_NE(c.error().find("more"), std::string::npos);
  }
  {
    Copy c("qwen3");
    c.edit([](io::Json& j) { j["rope_parameters"] = {{"rope_type", "longrope"}, {"rope_theta", 1e4}}; });
    EXPECT_NE(c.error().find("rope type 'longrope' is not supported"), std::string::npos) << c.error();
  }
  {
    Copy c("qwen3");
    c.edit([](io::Json& j) { j["vocab_size"] = "many"; });
    EXPECT_NE(c.error().find("vocab_size must be an integer"), std::string::npos) << c.error();
  }
  {
    Copy c("qwen3");
    c.edit([](io::Json& j) { j["num_experts_per_tok"] = 6; });
    EXPECT_NE(c.error().find("num_experts_per_tok must be in [1, 5], got 6"), std::string::npos) << c.error();
  }
  {
    Copy c("qwen3");
    fs::remove(c.dir / "model.safetensors");
    EXPECT_NE(c.error().find("holds neither model.safetensors nor model.safetensors.index.json"), std::string::npos)
        << c.error();
  }
  {
    Copy c("qwen3");
    fs::resize_file(c.dir / "model.safetensors", fs::file_size(c.dir / "model.safetensors") - 100);
    EXPECT_FALSE(c.error().empty());
  }
  {
    Copy c("qwen3_mixed");
    io::Json j = io::read_json(c.dir / "model.safetensors.index.json");
    j["weight_map"]["model.norm.weight"] = j["weight_map"]["lm_head.weight"];
    const bool moved = j["weight_map"]["model.norm.weight"] !=
                       io::read_json(c.dir / "model.safetensors.index.json")["weight_map"]["model.norm.weight"];
    io::write_json(c.dir / "model.safetensors.index.json", j);
    if (moved) { EXPECT_EQ(c.error(), "") << "every tensor of a listed file counts, as in transformers"; }
    j["weight_map"]["model.nowhere.weight"] = j["weight_map"]["lm_head.weight"];
    io::write_json(c.dir / "model.safetensors.index.json", j);
    EXPECT_NE(c.error().find("does not hold model.nowhere.weight"), std::string::npos) << c.error();
    j["weight_map"].erase("model.nowhere.weight");
    j["weight_map"]["model.norm.weight"] = "../model.safetensors";
    io::write_json(c.dir / "model.safetensors.index.json", j);
    EXPECT_NE(c.error().find("must be a file beside the index"), std::string::npos) << c.error();
  }
}

TEST(Decoder, RefusesIdsOutsideTheVocabulary) {
  at::NoGradGuard no_grad;
  const Decoder decoder(load_base(kGolden / "qwen3"));
  for (const int64_t id : {int64_t{67}, int64_t{-1}}) {
    try {
      decoder.forward(pack_rows(at::full({1, 2}, id, at::kLong)));
      FAIL();
    } catch (const UserError& e) {
      EXPECT_NE(std::string(e.what()).find("outside the vocabulary [0, 67)"), std::string::npos) << e.what();
    }
  }
}

}  // namespace
}  // namespace moegraft::model
