// What every adapter kind owes: step 0 equals the base, the gate decides by modality alone, an open gate equals merged
// weights.
#include "moegraft/adapters/modality_lora.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>

#include "../support/paths.h"
#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/decoder.h"

namespace moegraft::adapters {
namespace {

using model::Decoder;
using model::Gate;
using model::Site;

const std::filesystem::path kGolden = std::filesystem::path(test_source_dir()) / "tests/golden/model";
const char* const kBases[] = {"olmoe", "qwen3_mixed", "mixtral_window"};

AdapterConfig config_of(int64_t rank = 3) {
  AdapterConfig c;
  c.rank = rank;
  c.alpha = 5;
  return c;
}

std::shared_ptr<ModalityLora> random_lora(const model::DecoderSpec& spec, const AdapterConfig& config, uint64_t seed) {
  auto lora = std::make_shared<ModalityLora>(spec, config, 0, std::vector<int64_t>{1}, at::kCPU);
  at::manual_seed(seed);
  for (auto& f : lora->factors()) {
    f.A.detach().normal_(0, 0.3);
    f.B.detach().normal_(0, 0.3);
  }
  return lora;
}

// The base with every delta added to its weights: what an open gate must compute.
class Merged : public model::WeightProvider {
 public:
  Merged(std::shared_ptr<model::WeightProvider> base, std::shared_ptr<ModalityLora> lora)
      : base_(std::move(base)), lora_(std::move(lora)) {}
  kernels::Matrix embedding_VD() override { return base_->embedding_VD(); }
  kernels::Matrix head_VD() override { return base_->head_VD(); }
  at::Tensor final_norm_D() override { return base_->final_norm_D(); }
  model::LayerWeights layer(int64_t l) override {
    auto w = base_->layer(l);
    for (auto [site, weight] : {std::pair(Site::q, &w.attention.q), std::pair(Site::k, &w.attention.k),
                                std::pair(Site::v, &w.attention.v), std::pair(Site::o, &w.attention.o)})
      for (const auto& t : lora_->at(l, site))
        *weight = weight->tensor() + t.scale * at::mm(t.B.detach(), t.A.detach());
    return w;
  }
  model::ExpertWeights experts(int64_t l, int64_t first, int64_t count) override {
    auto w = base_->experts(l, first, count);
    for (auto [site, list] :
         {std::pair(Site::gate, &w.gate_FD), std::pair(Site::up, &w.up_FD), std::pair(Site::down, &w.down_DF)})
      for (const auto& t : lora_->at(l, site))
        for (int64_t e = 0; e < count; ++e)
          list->own()[e] = (*list)[e] + t.scale * at::mm(t.B.detach()[first + e], t.A.detach()[first + e]);
    w.panels = nullptr;
    return w;
  }
  at::ScalarType dtype() const override { return base_->dtype(); }
  at::Device device() const override { return base_->device(); }

 private:
  std::shared_ptr<model::WeightProvider> base_;
  std::shared_ptr<ModalityLora> lora_;
};

struct Case {
  Decoder decoder;
  model::PackedBatch batch;
  explicit Case(const char* name) : decoder(model::load_base(kGolden / name)) {
    batch = model::pack_rows(io::load_safetensors(kGolden / name / "golden.safetensors").at("input_ids"));
    batch.modality_T = (at::arange(22) % 3 == 1).to(at::kLong);
  }
  at::Tensor hidden(Gate gate = Gate::modality, bool text = false) {
    at::NoGradGuard no_grad;
    model::PackedBatch b = batch;
    if (text) b.modality_T = at::zeros_like(batch.modality_T);
    model::ForwardOptions options;
    options.gate = gate;
    return decoder.forward(b, options).hidden_TD;
  }
};

double distance(const at::Tensor& a, const at::Tensor& b) { return (a - b).abs().max().item<double>(); }

TEST(ModalityLora, StepZeroEqualsTheBaseAndTextKeepsItsBits) {
  for (const char* name : kBases) {
    Case c(name);
    const at::Tensor base = c.hidden(Gate::modality, true), mixed = c.hidden();
    auto lora = std::make_shared<ModalityLora>(c.decoder.spec(), config_of(), 0, std::vector<int64_t>{1}, at::kCPU);
    for (auto& f : lora->factors()) f.A.detach().normal_();
    c.decoder.attach(lora);
    EXPECT_LT(distance(c.hidden(), mixed), 1e-6) << name;  // B is zero
    c.decoder.attach(random_lora(c.decoder.spec(), config_of(), 2));
    EXPECT_TRUE(at::equal(c.hidden(Gate::modality, true), base)) << name;
    EXPECT_TRUE(at::equal(c.hidden(Gate::none), base))
        << name << ": a closed gate is the base, whatever the modalities";
    EXPECT_GT(distance(c.hidden(), mixed), 1e-2) << name;
  }
}

TEST(ModalityLora, AnOpenGateEqualsMergedWeights) {
  for (const char* name : kBases)
    for (const bool rslora : {false, true}) {
      Case c(name);
      AdapterConfig config = config_of();
      config.use_rslora = rslora;
      auto lora = random_lora(c.decoder.spec(), config, 3);
      EXPECT_DOUBLE_EQ(lora->scale(), rslora ? 5 / std::sqrt(3.0) : 5.0 / 3);
      Decoder merged(
          {c.decoder.base().path, c.decoder.spec(), std::make_shared<Merged>(c.decoder.base().weights, lora)});
      c.decoder.attach(lora);
      at::NoGradGuard no_grad;
      const at::Tensor expected = merged.forward(c.batch).hidden_TD;
      EXPECT_LT(distance(c.hidden(Gate::all), expected), 2e-4 * (1 + expected.abs().max().item<double>())) << name;
      // All tokens of the modality: the gate by modality is the open gate.
      c.batch.modality_T.fill_(1);
      EXPECT_LT(distance(c.hidden(), expected), 2e-4 * (1 + expected.abs().max().item<double>())) << name;
    }
}

TEST(ModalityLora, SeveralAdaptersAdd) {
  Case c("qwen3_mixed");
  auto stack = std::make_shared<AdapterStack>();
  auto a = random_lora(c.decoder.spec(), config_of(), 4);
  stack->add(a);
  stack->add(a);
  c.decoder.attach(stack);
  const at::Tensor twice = c.hidden();
  AdapterConfig doubled = config_of();
  doubled.alpha *= 2;
  c.decoder.attach(random_lora(c.decoder.spec(), doubled, 4));
  EXPECT_LT(distance(c.hidden(), twice), 1e-4);
}

TEST(ModalityLora, ShapesNamesAndRegistry) {
  const auto spec = model::read_spec(
      kGolden /
      "qwen3_mixed");  // layers 0 to 2 are dense but 3 sparse by decoder_sparse_step 2 and mlp_only_layers [1]
  ModalityLora lora(spec, config_of(), 7, {1}, at::kCPU);
  model::ParameterRegistry registry;
  lora.register_parameters(registry);
  EXPECT_EQ(registry.all().size(), 2 * lora.factors().size());
  int64_t experts = 0;
  for (const auto& f : lora.factors()) experts += f.A.dim() == 3;
  EXPECT_EQ(experts, 3);
  ASSERT_NE(registry.find("adapters.7.layers.3.down.B"), nullptr);
  EXPECT_EQ(registry.find("adapters.7.layers.3.down.B")->tensor.sizes(), (at::IntArrayRef{5, 16, 3}));
  const model::Parameter& down = *registry.find("adapters.7.layers.3.down.A");
  EXPECT_EQ(down.sharding, model::Sharding::expert);
  EXPECT_EQ(down.layer, 3);
  EXPECT_EQ(down.modalities, (std::vector<int64_t>{1}));
  EXPECT_EQ(registry.find("adapters.7.layers.0.k.A")->sharding, model::Sharding::replicated);
  EXPECT_EQ(registry.find("adapters.7.layers.0.k.A")->tensor.sizes(), (at::IntArrayRef{3, 16}));
  EXPECT_EQ(registry.find("adapters.7.layers.1.gate.A"), nullptr);
}

TEST(ModalityLora, BadSitesAndLayersAreNamed) {
  const auto spec = model::read_spec(kGolden / "qwen3");
  const auto error = [&](const std::function<void(AdapterConfig&)>& change) {
    AdapterConfig c = config_of();
    change(c);
    try {
      ModalityLora(spec, c, 0, {1}, at::kCPU);
    } catch (const UsageError& e) { return std::string(e.what()); }
    return std::string();
  };
  EXPECT_NE(error([](auto& c) { c.sites = {"gat"}; }).find("'gat' is not a site"), std::string::npos);
  EXPECT_NE(error([](auto& c) { c.sites = {"up", "up"}; }).find("twice"), std::string::npos);
  EXPECT_NE(error([](auto& c) { c.layers = {2}; }).find("must be in [0, 1], got 2"), std::string::npos);
}

}  // namespace
}  // namespace moegraft::adapters
