#include "moegraft/model/random_base.h"

#include <ATen/detail/CUDAHooksInterface.h>

#include <cmath>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"
#include "resident_weights.h"

namespace moegraft::model {
namespace {

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
  return x;
}

DenseWeights draw_dense(Draw& draw, const DecoderSpec& s) {
  DenseWeights d;
  d.gate_ID = draw.linear({s.intermediate_size, s.hidden_size}), d.up_ID = draw.linear({s.intermediate_size, s.hidden_size}), d.down_DI = draw.linear({s.hidden_size, s.intermediate_size});
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
  auto w = std::make_shared<ResidentWeights>();
  w->type = dtype, w->where = device;
  const int64_t D = spec.hidden_size;
  w->embedding = spec.tie_word_embeddings ? draw.linear({spec.vocab_size, D}) : draw.normal({spec.vocab_size, D}, 1.0);
  w->head = spec.tie_word_embeddings ? w->embedding : draw.linear({spec.vocab_size, D});
  w->final_norm = draw.ones(D);
  for (const auto& kind : spec.layers) {
    LayerWeights layer;
    layer.input_norm_D = draw.ones(D), layer.post_norm_D = draw.ones(D);
    layer.attention = draw_attention(draw, spec);
    if (kind.sparse) layer.router_ED = draw.linear({spec.num_experts, D});
    else layer.dense = draw_dense(draw, spec);
    w->layers.push_back(std::move(layer));
    w->layer_experts.push_back(kind.sparse ? draw_experts(draw, spec) : ExpertWeights{});
  }
  finish_frozen(*w, packs_lean(spec));
  BaseModel base;
  base.spec = spec;
  base.weights = std::move(w);
  return base;
}

}  // namespace moegraft::model
