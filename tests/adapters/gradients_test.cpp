// Gradients of whole models, every projection with its factors, against transformers' (tests/golden/make_gradients.py).
#include <gtest/gtest.h>

#include <filesystem>

#include "libtorch.h"
#include "moegraft/adapters/modality_lora.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/decoder.h"

namespace moegraft::adapters {
namespace {

const std::filesystem::path kGolden = std::filesystem::path(MOEGRAFT_SOURCE_DIR) / "tests/golden/model";

AdapterConfig everywhere() {
  AdapterConfig c;
  c.rank = 3;
  c.alpha = 5;
  c.sites = {"q", "k", "v", "o", "gate", "up", "down"};
  return c;
}

// The relative distance of a gradient from transformers', by the norm.
double error_of(const at::Tensor& got, const at::Tensor& want) { return (got - want).norm().item<double>() / want.norm().item<double>(); }

class GoldenGradients : public ::testing::TestWithParam<const char*> {};

TEST_P(GoldenGradients, AreThoseOfTransformers) {
  const auto dir = kGolden / GetParam();
  auto golden = io::load_safetensors(dir / "gradients.safetensors");
  const at::Tensor ids = io::load_safetensors(dir / "golden.safetensors").at("input_ids");
  const int64_t B = ids.size(0), S = ids.size(1);
  for (const int64_t recompute : {0, 99}) {
    model::Decoder decoder(model::load_base(dir));
    auto lora = std::make_shared<ModalityLora>(decoder.spec(), everywhere(), 0, std::vector<int64_t>{1}, at::kCPU);
    const auto key = [](const ModalityLora::Factor& f, const char* which) { return std::to_string(f.layer) + "." + site_name(f.site) + "." + which; };
    size_t compared = 0;
    for (auto& f : lora->factors()) {
      f.A.detach().copy_(golden.at(key(f, "A")));
      f.B.detach().copy_(golden.at(key(f, "B")));
    }
    decoder.attach(lora);
    model::PackedBatch batch = model::pack_rows(ids);
    batch.labels_T = at::cat({ids.narrow(1, 1, S - 1), at::full({B, 1}, -100, ids.options())}, 1).reshape({-1});
    model::ForwardOptions options;
    options.gate = model::Gate::all;
    options.recompute_layers = recompute;
    const auto forward = decoder.forward(batch, options);
    const at::Tensor loss = model::cross_entropy_loss(decoder, forward, batch).loss;
    EXPECT_NEAR(loss.item<double>(), golden.at("loss").item<double>(), 1e-5);
    loss.backward();
    for (const auto& f : lora->factors())
      for (const auto& [which, tensor] : {std::pair("A", f.A), std::pair("B", f.B)}) {
        ASSERT_TRUE(tensor.grad().defined()) << key(f, which);
        EXPECT_LT(error_of(tensor.grad(), golden.at("grad." + key(f, which))), 1e-4) << key(f, which);
        ++compared;
      }
    EXPECT_EQ(2 * compared + 1, golden.size());
  }
}

INSTANTIATE_TEST_SUITE_P(Bases, GoldenGradients, ::testing::Values("mixtral", "mixtral_window", "olmoe", "olmoe_clip_norm_tied", "qwen3", "qwen3_mixed"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace moegraft::adapters
