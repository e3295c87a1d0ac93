// A training step's device branches with the device emulated on the host, beside the host's own.
#ifndef MOEGRAFT_HAVE_CUDA

#include <gtest/gtest.h>

#include "../support/emulation.h"
#include "aligned_model.h"
#include "libtorch.h"

namespace moegraft::model {
namespace {

double distance(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

// Gated terms on all of attention and on one of the experts' products: masters, as in training.
class AttentionTerms : public AdapterSites {
 public:
  explicit AttentionTerms(const DecoderSpec& s) {
    at::manual_seed(1);
    const int64_t D = s.hidden_size, H = s.num_heads * s.head_dim, G = s.num_kv_heads * s.head_dim;
    for (int64_t l = 0; l < s.num_layers; ++l)
      for (const auto& [site, in, out] :
           {std::tuple(Site::q, D, H), std::tuple(Site::k, D, G), std::tuple(Site::v, D, G), std::tuple(Site::o, H, D)})
        add(l, site, {4, in}, {out, 4}, {1});
    add(0, Site::q, {2, D}, {H, 2}, {1, 2});  // a second term on the same rows and on others
    add(1, Site::up, {s.num_experts, 8, D}, {s.num_experts, s.moe_intermediate_size, 8}, {1});
  }
  std::vector<LowRank> at(int64_t layer, Site site) const override {
    const auto it = terms_.find({layer, site});
    return it == terms_.end() ? std::vector<LowRank>() : it->second;
  }
  std::vector<at::Tensor> masters;

 private:
  void add(int64_t layer, Site site, at::IntArrayRef a, at::IntArrayRef b, std::vector<int64_t> modalities) {
    masters.push_back((0.3 * at::randn(a)).set_requires_grad(true));
    masters.push_back((0.3 * at::randn(b)).set_requires_grad(true));
    terms_[{layer, site}].push_back({masters[masters.size() - 2], masters.back(), 1.5, std::move(modalities)});
  }
  std::map<std::pair<int64_t, Site>, std::vector<LowRank>> terms_;
};

// A caption and a picture, text alone, a picture without a caption, and codes of a third modality.
PackedBatch mixed_batch(const DecoderSpec& s) {
  PackedBatch batch;
  const std::vector<int64_t> lengths{20 + 9, 6, 7, 5};
  batch.cu_seqlens = {0};
  for (const int64_t n : lengths) batch.cu_seqlens.push_back(batch.cu_seqlens.back() + n);
  const int64_t T = batch.cu_seqlens.back();
  batch.modality_T = at::zeros({T}, at::kLong);
  batch.modality_T.narrow(0, 20, 9).fill_(1);
  batch.modality_T.narrow(0, 29 + 6, 7).fill_(1);
  batch.modality_T.narrow(0, 29 + 6 + 7, 5).fill_(2);
  auto g = at::make_generator<at::CPUGeneratorImpl>(3);
  batch.ids_T = at::randint(0, 20, {T}, g, at::kLong) +
                at::where(batch.modality_T == 0, 0, s.vocab_size + 20 * (batch.modality_T - 1));
  std::vector<at::Tensor> positions;
  for (const int64_t n : lengths) positions.push_back(at::arange(n, at::kLong));
  batch.positions_T = at::cat(positions);
  batch.labels_T = at::cat({batch.ids_T.narrow(0, 1, T - 1), at::full({1}, kNoLabel, at::kLong)});
  return batch;
}

struct Step {
  at::Tensor hidden_TD;
  double loss;
  std::vector<at::Tensor> gradients;  // of the masters, then of the new rows
};

// In float32: in bf16 a near-tied expert flips and says nothing; there the operations are compared one by one
// (tests/kernels).
class EmulatedStep : public testing::Test {
 protected:
  EmulatedStep() {
    BaseModel base = model_.load(at::kFloat, at::kCPU);
    base.weights = std::make_shared<AsOnADevice>(base.weights);
    decoder_.emplace(std::move(base));
    const DecoderSpec& s = decoder_->spec();
    terms_ = std::make_shared<AttentionTerms>(s);
    decoder_->attach(terms_);
    for (int64_t m = 1; m <= 2; ++m) {
      rows_.push_back((0.3 * at::randn({20, s.hidden_size})).set_requires_grad(true));
      decoder_->attach_rows({m, s.vocab_size + 20 * (m - 1), rows_.back(), rows_.back()});
    }
  }
  Step step(const ForwardOptions& options = {}) const {
    std::vector<at::Tensor> leaves = terms_->masters;
    leaves.insert(leaves.end(), rows_.begin(), rows_.end());
    for (at::Tensor& leaf : leaves) leaf.mutable_grad().reset();
    const PackedBatch batch = mixed_batch(decoder_->spec());
    const ForwardResult result = decoder_->forward(batch, options);
    const LossResult loss = cross_entropy_loss(*decoder_, result, batch, 0);
    loss.loss.backward();
    Step out{result.hidden_TD.detach(), loss.loss.item<double>(), {}};
    for (const at::Tensor& leaf : leaves) out.gradients.push_back(leaf.grad().clone());
    return out;
  }
  static void expect_equal(const Step& device, const Step& host) {
    const double tolerance = 2e-5;  // sums in another order, a few units of float32 of what is largest
    EXPECT_LT(distance(device.hidden_TD, host.hidden_TD), tolerance * host.hidden_TD.abs().max().item<double>());
    EXPECT_NEAR(device.loss, host.loss, tolerance * host.loss);
    for (size_t i = 0; i < host.gradients.size(); ++i)
      EXPECT_LT(distance(device.gradients[i], host.gradients[i]),
                tolerance * host.gradients[i].abs().max().item<double>())
          << "leaf " << i;
  }

  AlignedModel model_;
  std::optional<Decoder> decoder_;
  std::shared_ptr<AttentionTerms> terms_;
  std::vector<at::Tensor> rows_;
};

TEST_F(EmulatedStep, AttentionsLengthsLieOnTheDeviceOnceForAllLayers) {
  for (const int64_t recomputed : {0, 2})
    for (const bool prefix : {false, true}) {
      ForwardOptions options;
      options.frozen_prefix = prefix;
      options.recompute_layers = recomputed;
      const Step host = step(options);
      const kernels::Emulation on;
      kernels::emulated_attention = true;
      kernels::attention_lengths.clear();
      const Step device = step(options);
      expect_equal(device, host);
      std::set<const void*> queries, keys;
      for (const auto& given : kernels::attention_lengths) {
        ASSERT_TRUE(given.cu_q.defined() && given.cu_kv.defined());
        queries.insert(given.cu_q.const_data_ptr());
        keys.insert(given.cu_kv.const_data_ptr());
      }
      const size_t passes = prefix ? 2 : 1, layers = 2;
      EXPECT_EQ(queries.size(), passes);
      EXPECT_EQ(keys.size(), passes);
      EXPECT_EQ(kernels::attention_lengths.size(),
                layers * (passes + 1 + (recomputed ? 1 : 0)));  // forwards, backwards, and again where recomputed
    }
}

}  // namespace
}  // namespace moegraft::model

#endif
