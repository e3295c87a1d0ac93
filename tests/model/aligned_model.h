#pragma once
// A small random model for the device's paths, emulated or real.

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "libtorch.h"
#include "moegraft/model/decoder.h"

namespace moegraft::model {

// A random model whose widths the device's products take.
class AlignedModel {
 public:
  AlignedModel() {
    DecoderSpec s;
    s.family = "mixtral";
    s.vocab_size = 96;
    s.hidden_size = 32, s.num_heads = 4, s.num_kv_heads = 2, s.head_dim = 8;
    s.num_layers = 2, s.layers = {{true, 5}, {true, 5}};
    s.moe_intermediate_size = s.intermediate_size = 24;
    s.num_experts = 6, s.num_experts_per_tok = 2, s.norm_topk_prob = true;
    s.max_positions = 64, s.initializer_range = 0.3;
    save_base(init_base(s, {1.0, 5}), dir_, at::kFloat);
    ids_BS = at::randint(3, 96, {2, 11}, at::make_generator<at::CPUGeneratorImpl>(3), at::kLong);
  }
  ~AlignedModel() { std::filesystem::remove_all(dir_); }
  BaseModel load(at::ScalarType dtype, at::Device device) const { return load_base(dir_, {dtype, device}); }
  at::Tensor ids_BS;

 private:
  const std::filesystem::path dir_ = std::filesystem::path(testing::TempDir()) / ("moegraft-aligned-" + std::to_string(::getpid()));
};

// The host's own layouts of frozen weights are not the device's business.
class WithoutPanels : public WeightProvider {
 public:
  explicit WithoutPanels(std::shared_ptr<WeightProvider> weights) : weights_(std::move(weights)) {}
  at::Tensor embedding_VD() override { return weights_->embedding_VD(); }
  at::Tensor head_VD() override { return weights_->head_VD(); }
  at::Tensor final_norm_D() override { return weights_->final_norm_D(); }
  LayerWeights layer(int64_t index) override {
    LayerWeights w = weights_->layer(index);
    w.attention.q_panels = w.attention.k_panels = w.attention.v_panels = w.attention.o_panels = nullptr;
    return w;
  }
  ExpertWeights experts(int64_t layer, int64_t first, int64_t count) override { return weights_->experts(layer, first, count); }
  at::ScalarType dtype() const override { return weights_->dtype(); }
  at::Device device() const override { return weights_->device(); }

 private:
  std::shared_ptr<WeightProvider> weights_;
};

}  // namespace moegraft::model
