#pragma once
// A small random model for the device's paths, emulated or real.

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "libtorch.h"
#include "moegraft/kernels/expert_layout.h"
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
    s.num_experts = 6, s.num_experts_per_tok = 2, s.router.renormalise = true;
    s.max_positions = 64, s.initializer_range = 0.3;
    save_base(init_base(s, {1.0, 5}), dir_, at::kFloat);
    ids_BS = at::randint(3, 96, {2, 11}, at::make_generator<at::CPUGeneratorImpl>(3), at::kLong);
  }
  ~AlignedModel() { std::filesystem::remove_all(dir_); }
  BaseModel load(at::ScalarType dtype, at::Device device) const { return load_base(dir_, {dtype, device}); }
  at::Tensor ids_BS;

 private:
  const std::filesystem::path dir_ =
      std::filesystem::path(testing::TempDir()) / ("moegraft-aligned-" + std::to_string(::getpid()));
};

// On the host, weights as a device has them: without the host's own layouts of frozen ones, a layer's experts in one
// storage.
class AsOnADevice : public WeightProvider {
 public:
  explicit AsOnADevice(std::shared_ptr<WeightProvider> inner) : inner_(std::move(inner)) {}
  kernels::Matrix embedding_VD() override { return inner_->embedding_VD(); }
  kernels::Matrix head_VD() override { return inner_->head_VD().tensor(); }
  at::Tensor final_norm_D() override { return inner_->final_norm_D(); }
  LayerWeights layer(int64_t index) override {
    LayerWeights w = inner_->layer(index);
    for (kernels::Matrix* m : {&w.attention.q, &w.attention.k, &w.attention.v, &w.attention.o}) *m = m->tensor();
    return w;
  }
  ExpertWeights experts(int64_t layer, int64_t first, int64_t count) override {
    ExpertWeights w = inner_->experts(layer, first, count);
    w.panels = nullptr;
    kernels::join_experts(w.gate_FD, w.up_FD, w.down_DF);
    return w;
  }
  void prefetch(int64_t layer) override { inner_->prefetch(layer); }
  bool transient() const override { return inner_->transient(); }
  at::ScalarType dtype() const override { return inner_->dtype(); }
  at::Device device() const override { return inner_->device(); }

 private:
  std::shared_ptr<WeightProvider> inner_;
};

}  // namespace moegraft::model
