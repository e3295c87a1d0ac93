// Gradients of whole models, every projection with its factors and new rows of the vocabulary, against transformers'
// (tests/golden/make_gradients.py).
#include <gtest/gtest.h>

#include <filesystem>

#include "../support/paths.h"
#include "libtorch.h"
#include "moegraft/adapters/modality_lora.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/decoder.h"

namespace moegraft::adapters {
namespace {

const std::filesystem::path kGolden = std::filesystem::path(test_source_dir()) / "tests/golden/model";

AdapterConfig everywhere() {
  AdapterConfig c;
  c.rank = 3;
  c.alpha = 5;
  c.sites = {"q", "k", "v", "o", "gate", "up", "down"};
  return c;
}

// The relative distance of a gradient from transformers', by the norm.
double error_of(const at::Tensor& got, const at::Tensor& want) {
  return (got - want).norm().item<double>() / want.norm().item<double>();
}

struct Case {
  const char* base;
  model::Gate gate;
  int64_t recompute;
};
std::string name_of(const Case& c) {
  return std::string(c.base) + (c.gate == model::Gate::all ? "_open" : "_image") + (c.recompute ? "_recomputed" : "");
}

class GoldenGradients : public ::testing::TestWithParam<Case> {};

TEST_P(GoldenGradients, AreThoseOfTransformers) {
  const Case& c = GetParam();
  auto golden = io::load_safetensors(kGolden / c.base / "gradients.safetensors");
  const at::Tensor ids = golden.at("input_ids");
  const int64_t B = ids.size(0), S = ids.size(1);
  model::Decoder decoder(model::load_base(kGolden / c.base));
  const int64_t V = decoder.spec().vocab_size;
  auto lora = std::make_shared<ModalityLora>(decoder.spec(), everywhere(), 0, std::vector<int64_t>{1}, at::kCPU);
  model::ModalityRows rows{1, V, at::empty_like(golden.at("rows.embedding")).requires_grad_(true),
                           at::empty_like(golden.at("rows.head")).requires_grad_(true)};
  std::vector<std::pair<std::string, at::Tensor>> leaves{{"rows.embedding", rows.embedding_ND},
                                                         {"rows.head", rows.head_ND}};
  for (auto& f : lora->factors()) {
    const std::string name = std::to_string(f.layer) + "." + site_name(f.site);
    leaves.insert(leaves.end(), {{name + ".A", f.A}, {name + ".B", f.B}});
  }
  for (auto& [name, leaf] : leaves) leaf.detach().copy_(golden.at(name));
  ASSERT_EQ(3 * leaves.size() + 3, golden.size());  // each with its gradient for either gate; ids and two losses
  decoder.attach_rows(rows);
  decoder.attach(lora);

  model::PackedBatch batch = model::pack_rows(ids);
  batch.modality_T = batch.ids_T.ge(V).to(at::kLong);
  batch.labels_T =
      at::cat({ids.narrow(1, 1, S - 1), at::full({B, 1}, model::kNoLabel, ids.options())}, 1).reshape({-1});
  model::ForwardOptions options;
  options.gate = c.gate;
  options.recompute_layers = c.recompute;
  const at::Tensor loss = model::cross_entropy_loss(decoder, decoder.forward(batch, options), batch).loss;
  const std::string kind = c.gate == model::Gate::all ? "open." : "image.";
  EXPECT_NEAR(loss.item<double>(), golden.at(kind + "loss").item<double>(), 1e-5);
  loss.backward();
  for (const auto& [name, leaf] : leaves) {
    ASSERT_TRUE(leaf.grad().defined()) << name;
    EXPECT_LT(error_of(leaf.grad(), golden.at(kind + "grad." + name)), 1e-4) << name;
  }
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const char* base : {"mixtral",
                           "mixtral_window",
                           "olmoe",
                           "olmoe_clip_norm_tied",
                           "qwen3",
                           "qwen3_mixed",
                           "llama",
                           "llama_bias_tied",
                           "llama_llama3",
                           "mistral_window",
                           "mistral_full_tied",
                           "mistral_yarn",
                           "qwen3_dense",
                           "qwen3_dense_window",
                           "qwen3_dense_tied",
                           "qwen2_moe",
                           "qwen2_moe_mixed",
                           "qwen2_moe_tied",
                           "dots1",
                           "dots1_groups",
                           "dots1_tied"})
    for (const model::Gate gate : {model::Gate::all, model::Gate::modality})
      for (const int64_t recompute : {0, 99}) all.push_back({base, gate, recompute});
  return all;
}

INSTANTIATE_TEST_SUITE_P(Bases, GoldenGradients, ::testing::ValuesIn(cases()),
                         [](const auto& info) { return name_of(info.param); });

}  // namespace
}  // namespace moegraft::adapters
