#include "moegraft/model/random_base.h"

#include <ATen/detail/CUDAHooksInterface.h>

#include <cmath>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"

namespace moegraft::model {
namespace {

class RandomWeights : public WeightProvider {
 public:
  at::Tensor embedding, head, final_norm;
  Panels head_panels_;
  std::vector<LayerWeights> layers;
  std::vector<ExpertWeights> layer_experts;
  at::ScalarType type = at::kFloat;
  at::Device where = at::kCPU;

  at::Tensor embedding_VD() override { return embedding; }
  at::Tensor head_VD() override { return head; }
  Panels head_panels() override { return head_panels_; }
  at::Tensor final_norm_D() override { return final_norm; }
  LayerWeights layer(int64_t index) override { return layers.at(size_t(index)); }
  ExpertWeights experts(int64_t layer, int64_t first, int64_t count) override {
    const ExpertWeights& all = layer_experts.at(size_t(layer));
    MOEGRAFT_INVARIANT(first == 0 && count == all.count(), "a random base is whole: experts ", first, "+", count, " of ", all.count());
    return all;
  }
  at::ScalarType dtype() const override { return type; }
  at::Device device() const override { return where; }
};

// Every tensor from a stream of its own.
class Draw {
 public:
  Draw(at::ScalarType dtype, at::Device device, uint64_t seed)
      : options_(at::TensorOptions(dtype).device(device)), seed_(seed), generator_(device.is_cuda() ? at::detail::getCUDAHooks().getNewGenerator(device.index()) : at::make_generator<at::CPUGeneratorImpl>(seed)) {}

  at::Tensor normal(at::IntArrayRef shape, double std) {
    generator_.set_current_seed(Rng(seed_, "model.random", stream_++).derive_seed());
    return at::empty(shape, options_).normal_(0.0, std, generator_);
  }
  at::Tensor linear(at::IntArrayRef shape) { return normal(shape, 1 / std::sqrt(double(shape.back()))); }
  // Norms of a layer are float32 on a CPU: as load_base keeps them there.
  at::Tensor wide(const at::Tensor& t) const { return options_.device().is_cpu() ? t.to(at::kFloat) : t; }
  at::Tensor ones(int64_t size) const { return at::ones({size}, options_); }
  at::Tensor zeros(int64_t size) const { return at::zeros({size}, options_); }

 private:
  at::TensorOptions options_;
  uint64_t seed_, stream_ = 0;
  at::Generator generator_;
};

AttentionWeights draw_attention(Draw& draw, const DecoderSpec& s) {
  const int64_t D = s.hidden_size, q = s.num_heads * s.head_dim, kv = s.num_kv_heads * s.head_dim;
  AttentionWeights a;
  a.q = draw.linear({q, D}), a.k = draw.linear({kv, D}), a.v = draw.linear({kv, D}), a.o = draw.linear({D, q});
  if (s.attention_bias) a.q_bias = draw.zeros(q), a.k_bias = draw.zeros(kv), a.v_bias = draw.zeros(kv), a.o_bias = draw.zeros(D);
  if (s.qk_norm == QkNorm::per_head) a.q_norm = draw.ones(s.head_dim), a.k_norm = draw.ones(s.head_dim);
  if (s.qk_norm == QkNorm::full) a.q_norm = draw.ones(q), a.k_norm = draw.ones(kv);
  a.q_panels = kernels::make_weight_panels(a.q), a.k_panels = kernels::make_weight_panels(a.k);
  a.v_panels = kernels::make_weight_panels(a.v), a.o_panels = kernels::make_weight_panels(a.o);
  return a;
}

// Gate and up in one storage, down in another, as kernels::join_experts lays them.
ExpertWeights draw_experts(Draw& draw, const DecoderSpec& s) {
  const int64_t D = s.hidden_size, F = s.moe_intermediate_size, E = s.num_experts;
  const at::Tensor gate_up = draw.linear({E, 2 * F, D}), down = draw.linear({E, D, F});
  ExpertWeights x;
  for (int64_t e = 0; e < E; ++e) {
    x.gate_FD.push_back(gate_up[e].narrow(0, 0, F));
    x.up_FD.push_back(gate_up[e].narrow(0, F, F));
    x.down_DF.push_back(down[e]);
  }
  kernels::ExpertFfnWeights ffn;
  ffn.gate_FD = x.gate_FD, ffn.up_FD = x.up_FD, ffn.down_DF = x.down_DF;
  x.panels = kernels::make_expert_panels(ffn, nullptr, packs_lean(s));
  return x;
}

DenseWeights draw_dense(Draw& draw, const DecoderSpec& s) {
  DenseWeights d;
  d.gate_ID = draw.linear({s.intermediate_size, s.hidden_size}), d.up_ID = draw.linear({s.intermediate_size, s.hidden_size}), d.down_DI = draw.linear({s.hidden_size, s.intermediate_size});
  d.gate_panels = kernels::make_weight_panels(d.gate_ID), d.up_panels = kernels::make_weight_panels(d.up_ID), d.down_panels = kernels::make_weight_panels(d.down_DI);
  return d;
}

}  // namespace

DecoderSpec cut_layers(DecoderSpec spec, int64_t layers) {
  MOEGRAFT_CHECK_USAGE(layers >= 1 && layers <= spec.num_layers, "layers must be in [1, ", spec.num_layers, "] of this model, got ", layers);
  spec.num_layers = layers;
  spec.layers.resize(size_t(layers));
  return spec;
}

BaseModel random_base(const DecoderSpec& spec, at::ScalarType dtype, at::Device device, uint64_t seed) {
  const at::NoGradGuard no_grad;
  Draw draw(dtype, device, seed);
  auto w = std::make_shared<RandomWeights>();
  w->type = dtype, w->where = device;
  const int64_t D = spec.hidden_size;
  w->embedding = spec.tie_word_embeddings ? draw.linear({spec.vocab_size, D}) : draw.normal({spec.vocab_size, D}, 1.0);
  w->head = spec.tie_word_embeddings ? w->embedding : draw.linear({spec.vocab_size, D});
  w->head_panels_ = kernels::make_weight_panels(w->head);
  w->final_norm = draw.wide(draw.ones(D));
  for (const auto& kind : spec.layers) {
    LayerWeights layer;
    layer.input_norm_D = draw.wide(draw.ones(D)), layer.post_norm_D = draw.wide(draw.ones(D));
    layer.attention = draw_attention(draw, spec);
    if (kind.sparse) layer.router_ED = draw.linear({spec.num_experts, D}).to(at::kFloat);  // as its product is
    else layer.dense = draw_dense(draw, spec);
    w->layers.push_back(std::move(layer));
    w->layer_experts.push_back(kind.sparse ? draw_experts(draw, spec) : ExpertWeights{});
  }
  BaseModel base;
  base.spec = spec;
  base.weights = std::move(w);
  return base;
}

}  // namespace moegraft::model
