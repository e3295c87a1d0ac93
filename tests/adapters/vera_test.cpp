#include "moegraft/adapters/vera.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>

#include "../support/paths.h"
#include "libtorch.h"
#include "moegraft/adapters/modality_lora.h"
#include "moegraft/model/decoder.h"

namespace moegraft::adapters {
namespace {

const std::filesystem::path kGolden = std::filesystem::path(test_source_dir()) / "tests/golden/model";

AdapterConfig config_of(AdapterKind kind) {
  AdapterConfig c;
  c.kind = kind, c.rank = 5, c.alpha = 5;  // LoRA's scale is 1 then
  c.sites = {"q", "k", "v", "o", "gate", "up", "down", "router"};
  return c;
}

// Ids of text and, from V on, of the new modality; every token labelled with its successor.
model::PackedBatch batch_of(int64_t V, int64_t new_rows) {
  const at::Tensor ids = at::cat({at::arange(3, 9), V + at::arange(4).remainder(new_rows), at::arange(20, 24),
                                  V + at::arange(3).remainder(new_rows)})
                             .view({1, -1});
  model::PackedBatch batch = model::pack_rows(ids);
  batch.modality_T = batch.ids_T.ge(V).to(at::kLong);
  batch.labels_T = at::cat({batch.ids_T.slice(0, 1), at::full({1}, model::kNoLabel, at::kLong)});
  return batch;
}

struct Grafted {
  model::Decoder decoder;
  explicit Grafted(const std::string& base) : decoder(model::load_base(kGolden / base)) {
    const int64_t V = decoder.spec().vocab_size, D = decoder.spec().hidden_size;
    auto rows = [&] { return at::randn({6, D}, at::make_generator<at::CPUGeneratorImpl>(4)); };
    decoder.attach_rows({1, V, rows(), rows()});
  }
  at::Tensor loss(model::Gate gate) {
    const model::PackedBatch batch = batch_of(decoder.spec().vocab_size, 6);
    model::ForwardOptions options;
    options.gate = gate;
    return model::cross_entropy_loss(decoder, decoder.forward(batch, options), batch).loss;
  }
};

void randomise(Vera& vera) {
  const at::NoGradGuard no_grad;
  uint64_t seed = 1;
  for (const auto& p : vera.parameters())
    p.leaf.copy_(at::randn(p.leaf.sizes(), at::make_generator<at::CPUGeneratorImpl>(seed++)).mul_(0.5));
}

class VeraOn : public ::testing::TestWithParam<const char*> {};

// LoRA with A' = diag(d) A and B' = diag(b) B gives the same loss, and its gradients give VeRA's by the chain rule: dd
// = sum dA' * A, db = sum dB' * B.
TEST_P(VeraOn, EqualsLoraWithItsProductsAndGradients) {
  Grafted g(GetParam());
  const auto& spec = g.decoder.spec();
  const auto vera_config = config_of(AdapterKind::vera), lora_config = config_of(AdapterKind::modality_lora);
  auto vera = std::make_shared<Vera>(AdapterContext{spec, vera_config, 0, {1}});
  randomise(*vera);
  auto lora = std::make_shared<ModalityLora>(spec, lora_config, 0, std::vector<int64_t>{1}, at::kCPU);
  {
    const at::NoGradGuard no_grad;
    for (const auto& f : lora->factors()) {
      const model::LowRank term = vera->at(f.layer, f.site).front();
      f.A.copy_(term.A), f.B.copy_(term.B);
    }
  }
  for (const model::Gate gate : {model::Gate::modality, model::Gate::all}) {
    g.decoder.attach(lora);
    const at::Tensor want = g.loss(gate);
    want.backward();
    g.decoder.attach(vera);
    const at::Tensor got = g.loss(gate);
    got.backward();
    EXPECT_NEAR(got.item<double>(), want.item<double>(), 1e-6);
    const auto parameters = vera->parameters();
    ASSERT_EQ(parameters.size(), 2 * lora->factors().size());
    for (size_t i = 0; i < lora->factors().size(); ++i) {
      const auto& f = lora->factors()[i];
      const at::Tensor A = vera->shared_A().narrow(1, 0, f.A.size(-1)), B = vera->shared_B().narrow(0, 0, f.B.size(-2));
      const at::Tensor dd = (f.A.grad() * A).sum(-1), db = (f.B.grad() * B).sum(-1);
      for (const auto& [leaf, expected] :
           {std::pair(parameters[2 * i].leaf, dd), std::pair(parameters[2 * i + 1].leaf, db)}) {
        ASSERT_TRUE(leaf.grad().defined()) << f.name;
        EXPECT_GT(expected.norm().item<double>(), 0) << f.name;
        EXPECT_LT((leaf.grad() - expected).norm().item<double>(), 1e-5 * expected.norm().item<double>()) << f.name;
      }
    }
    for (const auto& f : lora->factors()) f.A.mutable_grad() = at::Tensor(), f.B.mutable_grad() = at::Tensor();
    for (const auto& p : parameters) p.leaf.mutable_grad() = at::Tensor();
  }
}

TEST_P(VeraOn, StepZeroIsTheBaseAndTextKeepsItsBits) {
  const at::NoGradGuard no_grad;
  Grafted g(GetParam());
  const model::PackedBatch text = model::pack_rows(at::arange(3, 30).view({1, -1})),
                           mixed = batch_of(g.decoder.spec().vocab_size, 6);
  const at::Tensor base_text = g.decoder.forward(text).hidden_TD, base_mixed = g.decoder.forward(mixed).hidden_TD;
  const auto config = config_of(AdapterKind::vera);
  auto vera = std::make_shared<Vera>(AdapterContext{g.decoder.spec(), config, 0, {1}});
  vera->initialise();
  g.decoder.attach(vera);
  EXPECT_TRUE(at::equal(g.decoder.forward(mixed).hidden_TD, base_mixed));
  randomise(*vera);
  EXPECT_TRUE(at::equal(g.decoder.forward(text).hidden_TD, base_text));
  EXPECT_GT((g.decoder.forward(mixed).hidden_TD - base_mixed).abs().max().item<double>(), 1e-2);
}

INSTANTIATE_TEST_SUITE_P(Bases, VeraOn, ::testing::Values("qwen3", "mixtral", "qwen2_moe", "llama_bias_tied"),
                         [](const auto& info) { return std::string(info.param); });

TEST(Vera, FactorsFollowTheirVectorsWithoutGradients) {
  const at::NoGradGuard no_grad;
  Grafted g("qwen3");
  const auto config = config_of(AdapterKind::vera);
  Vera vera({g.decoder.spec(), config, 0, {1}});
  randomise(vera);
  const at::Tensor before = vera.at(0, model::Site::down).front().A;
  EXPECT_TRUE(vera.at(0, model::Site::down).front().A.is_same(before));
  for (const auto& p : vera.parameters()) p.leaf.mul_(2);
  EXPECT_TRUE(at::equal(vera.at(0, model::Site::down).front().A, before * 2));
  EXPECT_TRUE(vera.at(0, model::Site::router).size() == 1 && vera.at(99, model::Site::q).empty());
}

TEST(Vera, TrainsFewNumbersAndDrawsTheSameFactorsAgain) {
  Grafted g("qwen3");
  const auto& s = g.decoder.spec();
  auto config = config_of(AdapterKind::vera);
  const Vera a({s, config, 0, {1}}), b({s, config, 0, {1}});
  EXPECT_TRUE(at::equal(a.shared_A(), b.shared_A()) && at::equal(a.shared_B(), b.shared_B()));
  config.projection_seed = 1;
  const Vera other({s, config, 0, {1}});
  EXPECT_FALSE(at::equal(a.shared_A(), other.shared_A()));
  // Kaiming uniform: |x| <= sqrt(6 / in), and not far below.
  EXPECT_NEAR(a.shared_A().abs().max().item<double>(), std::sqrt(6.0 / double(a.shared_A().size(1))), 0.1);
  int64_t trained = 0, planned = 0;
  for (const auto& p : a.parameters()) trained += p.leaf.numel();
  for (const auto& [layer, site] : a.positions())
    for (const int64_t size : trained_sizes(AdapterKind::vera, config.rank, site_shape(s, site)))
      planned += size * (is_per_expert(s, site) ? s.num_experts : 1);
  EXPECT_EQ(trained, planned);
}

}  // namespace
}  // namespace moegraft::adapters
