// The same model on a GPU: logits and gradients of overlays against the CPU.
#include <gtest/gtest.h>

#include <filesystem>

#include "../support/gpu.h"
#include "../support/paths.h"
#include "libtorch.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/model/decoder.h"

namespace moegraft::model {
namespace {

const std::filesystem::path kGolden = std::filesystem::path(test_source_dir()) / "tests/golden/model";

// One gated low-rank term on every expert's gate and on q.
class Terms : public AdapterSites {
 public:
  Terms(const DecoderSpec& s, at::Device device) {
    at::manual_seed(1);
    const auto leaf = [&](at::IntArrayRef shape) { return (0.3 * at::randn(shape)).to(device).set_requires_grad(true); };
    gate_ = {leaf({s.num_experts, 3, s.hidden_size}), leaf({s.num_experts, s.moe_intermediate_size, 3}), 2.0, {1}};
    q_ = {leaf({3, s.hidden_size}), leaf({s.num_heads * s.head_dim, 3}), 2.0, {1}};
  }
  std::vector<LowRank> at(int64_t, Site site) const override {
    if (site == Site::gate) return {gate_};
    if (site == Site::q) return {q_};
    return {};
  }
  LowRank gate_, q_;
};

TEST(Cuda, LogitsLossAndGradientsEqualTheCpu) {
  MOEGRAFT_NEEDS_GPU();
  for (const char* name : {"olmoe", "qwen3_mixed", "mixtral_window"}) {
    std::vector<at::Tensor> results[3];
    for (const int variant : {0, 1, 2}) {  // the CPU, the GPU, the GPU with its experts in host memory
      const at::Device device(variant == 0 ? at::kCPU : at::kCUDA);
      Decoder decoder(load_base(kGolden / name, {at::kFloat, device, variant == 2 ? Experts::offloaded : Experts::resident}));
      auto terms = std::make_shared<Terms>(decoder.spec(), device);
      decoder.attach(terms);
      const at::Tensor ids = io::load_safetensors(kGolden / name / "golden.safetensors").at("input_ids").to(device);
      PackedBatch batch = pack_rows(ids);
      batch.modality_T = (at::arange(22) % 3 == 0).to(at::kLong).to(device);
      batch.labels_T = batch.ids_T.roll(-1);
      const auto forward = decoder.forward(batch);
      const auto loss = cross_entropy_loss(decoder, forward, batch);
      loss.loss.backward();
      for (const at::Tensor& t : {forward.hidden_TD.detach(), loss.loss.detach(), terms->gate_.A.grad(), terms->gate_.B.grad(), terms->q_.A.grad(), terms->q_.B.grad()})
        results[variant].push_back(t.to(at::kCPU, at::kDouble));
    }
    for (size_t i = 0; i < results[0].size(); ++i) {
      const double scale = 1 + results[0][i].abs().max().item<double>();
      for (const int variant : {1, 2})
        EXPECT_LT((results[0][i] - results[variant][i]).abs().max().item<double>(), 1e-4 * scale) << name << ", result " << i << (variant == 2 ? ", offloaded" : "");
    }
  }
}

}  // namespace
}  // namespace moegraft::model
