// Random weights are a model like any other: what a checkpoint of the same numbers would be.
#include "moegraft/model/random_base.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "../support/paths.h"
#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/model/decoder.h"

namespace moegraft::model {
namespace {

DecoderSpec small_spec() {
  DecoderSpec s;
  s.family = "qwen3_moe", s.qk_norm = QkNorm::per_head;
  s.vocab_size = 128, s.hidden_size = 64, s.num_heads = 4, s.num_kv_heads = 2, s.head_dim = 16;
  s.num_layers = 3, s.layers = {{true, 0}, {false, 0}, {true, 0}};
  s.moe_intermediate_size = 48, s.intermediate_size = 96, s.num_experts = 4, s.num_experts_per_tok = 2,
  s.router.renormalise = true;
  s.max_positions = 64;
  return s;
}

at::Tensor logits(BaseModel base) {
  const at::NoGradGuard no_grad;
  const Decoder decoder(std::move(base));
  return decoder.text_logits(decoder.forward(pack_rows(at::arange(3, 43).view({2, 20}))).hidden_TD);
}

TEST(RandomBase, IsWhatACheckpointOfItsNumbersIs) {
  const auto dir = std::filesystem::path(testing::TempDir()) / ("moegraft-random-" + std::to_string(::getpid()));
  for (const auto dtype : {at::kFloat, at::kBFloat16})
    for (const bool tied : {false, true}) {
      DecoderSpec spec = small_spec();
      spec.tie_word_embeddings = tied;
      save_base(random_base(spec, dtype, at::kCPU, 5), dir, dtype);
      EXPECT_TRUE(at::equal(logits(random_base(spec, dtype, at::kCPU, 5)), logits(load_base(dir, {dtype}))));
      EXPECT_FALSE(at::equal(logits(random_base(spec, dtype, at::kCPU, 6)), logits(load_base(dir, {dtype}))));
      std::filesystem::remove_all(dir);
    }
}

// Activations keep their size, so logits of an untied head are about standard normal.
TEST(RandomBase, KeepsActivationsTheirSize) {
  const at::Tensor l = logits(random_base(small_spec(), at::kFloat, at::kCPU)).to(at::kDouble);
  EXPECT_NEAR(l.std().item<double>(), 1.0, 0.1);
  EXPECT_NEAR(l.mean().item<double>(), 0.0, 0.1);
}

// What the benchmarks of a card draw is of the size that its name says.
TEST(RandomBase, TheLargeConfigIsThatOfAThirtyBillionModel) {
  const DecoderSpec spec =
      read_spec_file(std::filesystem::path(test_source_dir()) / "tests/bench/gpu/qwen3-30b-a3b.json");
  EXPECT_EQ(spec.num_parameters(), 30532122624);
  EXPECT_EQ(spec.num_layers, 48);
}

TEST(RandomBase, IsCutToItsFirstLayers) {
  const DecoderSpec cut = cut_layers(small_spec(), 2);
  EXPECT_EQ(cut.num_layers, 2);
  EXPECT_FALSE(cut.layers.back().sparse);
  EXPECT_LT(cut.num_parameters(), small_spec().num_parameters());
  for (const int64_t layers : {0, 4}) EXPECT_THROW(cut_layers(small_spec(), layers), UsageError);
}

}  // namespace
}  // namespace moegraft::model
