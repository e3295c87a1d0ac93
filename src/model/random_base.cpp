#include "moegraft/model/random_base.h"

#include <ATen/detail/CUDAHooksInterface.h>

#include <cmath>

#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/base/rng.h"
#include "resident_weights.h"
#include "tensor_slots.h"

namespace moegraft::model {
namespace {

// Every tensor from a stream of its own.
class Draw {
 public:
  Draw(at::ScalarType dtype, at::Device device, uint64_t seed)
      : options_(at::TensorOptions(dtype).device(device)),
        seed_(seed),
        generator_(device.is_cuda() ? at::detail::getCUDAHooks().getNewGenerator(device.index())
                                    : at::make_generator<at::CPUGeneratorImpl>(seed)) {}

  at::Tensor normal(at::IntArrayRef shape, double std) {
    generator_.set_current_seed(Rng(seed_, "model.random", stream_++).derive_seed());
    return at::empty(shape, options_).normal_(0.0, std, generator_);
  }
  at::Tensor linear(at::IntArrayRef shape) { return normal(shape, 1 / std::sqrt(double(shape.back()))); }
  at::Tensor constant(at::IntArrayRef shape, double value) const { return at::full(shape, value, options_); }

 private:
  at::TensorOptions options_;
  uint64_t seed_, stream_ = 0;
  at::Generator generator_;
};

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

}  // namespace

DecoderSpec cut_layers(DecoderSpec spec, int64_t layers) {
  MOEGRAFT_CHECK_USAGE(layers >= 1 && layers <= spec.num_layers, "layers must be in [1, ", spec.num_layers,
                       "] of this model, got ", layers);
  spec.num_layers = layers;
  spec.layers.resize(size_t(layers));
  return spec;
}

BaseModel random_base(const DecoderSpec& spec, at::ScalarType dtype, at::Device device, uint64_t seed,
                      std::optional<kernels::WeightFormat> quantise) {
  if (quantise) check_format(*quantise, device);
  const at::NoGradGuard no_grad;
  Draw draw(dtype, device, seed);
  const auto make = [&](const TensorRow& row) {
    const Shape shape = row.shape(spec);
    if (row.init == TensorInit::ones || row.init == TensorInit::zeros)
      return draw.constant(shape, row.init == TensorInit::ones ? 1.0 : 0.0);
    return row.init == TensorInit::embedding && !spec.tie_word_embeddings ? draw.normal(shape, 1.0)
                                                                          : draw.linear(shape);
  };
  auto w = make_weights(spec, make, [&] { return draw_experts(draw, spec); });
  w->type = dtype, w->where = device;
  finish_frozen(*w, packs_lean(spec), nullptr, quantise);
  BaseModel base;
  base.spec = spec;
  base.weights = std::move(w);
  return base;
}

}  // namespace moegraft::model
