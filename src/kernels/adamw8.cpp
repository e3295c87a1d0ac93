// Checks, the CPU path and the choice of device of the 8-bit AdamW step.

#include "adamw8_blocks.h"

#include <algorithm>
#include <cmath>

#include "implementations.h"
#include "libtorch.h"
#include "moegraft/base/check.h"
#include "moegraft/kernels/optimizer.h"

namespace moegraft::kernels {
namespace {

static_assert(kAdamw8Block == adamw8::kBlock);
constexpr int64_t kGrainBlocks = 32;

std::array<float, 256> make_map(DynamicMap map) {
  std::array<float, 256> values;
  for (int code = 0; code < 256; ++code)
    values[code] = map == DynamicMap::with_sign ? adamw8::signed_value(code) : adamw8::unsigned_value(code);
  return values;
}

template <class F>
void for_blocks(int64_t numel, const F& f) {
  at::parallel_for(0, (numel + kAdamw8Block - 1) / kAdamw8Block, kGrainBlocks, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) f(b, b * kAdamw8Block, std::min(kAdamw8Block, numel - b * kAdamw8Block));
  });
}

void step_cpu(const adamw8::Factors& f, const adamw8::Arrays& a, int) {
  const float *with_sign = dynamic_map(DynamicMap::with_sign).data(),
              *without_sign = dynamic_map(DynamicMap::without_sign).data();
  for_blocks(a.numel, [&](int64_t b, int64_t, int64_t) { adamw8::step_block(f, a, b, with_sign, without_sign); });
}

struct Step {
  bool (*serves)(const at::Tensor& parameter);
  void (*run)(const adamw8::Factors&, const adamw8::Arrays&, int device);
};
constexpr Step kSteps[]{{[](const at::Tensor& parameter) { return parameter.is_cuda(); }, adamw8::step_cuda},
                        {kAlways, step_cpu}};

Quantized8 zero_quantized(const at::Tensor& x) {
  return {at::zeros(x.sizes(), x.options().dtype(at::kByte).requires_grad(false)),
          at::zeros({(x.numel() + kAdamw8Block - 1) / kAdamw8Block}, x.options().requires_grad(false))};
}

void check_state(const Quantized8& q, const at::Tensor& parameter) {
  MOEGRAFT_INVARIANT(q.codes.scalar_type() == at::kByte && q.codes.is_contiguous() &&
                         q.codes.numel() == parameter.numel() && q.codes.device() == parameter.device(),
                     "adamw8: codes ", q.codes.sizes(), " for a parameter ", parameter.sizes());
  MOEGRAFT_INVARIANT(q.scales.scalar_type() == at::kFloat && q.scales.is_contiguous() &&
                         q.scales.numel() == (parameter.numel() + kAdamw8Block - 1) / kAdamw8Block &&
                         q.scales.device() == parameter.device(),
                     "adamw8: scales ", q.scales.sizes(), " for a parameter ", parameter.sizes());
}

}  // namespace

const std::array<float, 256>& dynamic_map(DynamicMap map) {
  static const std::array<float, 256> with_sign = make_map(DynamicMap::with_sign),
                                      without_sign = make_map(DynamicMap::without_sign);
  return map == DynamicMap::with_sign ? with_sign : without_sign;
}

Quantized8 quantize8(const at::Tensor& x, DynamicMap map) {
  MOEGRAFT_INVARIANT(x.is_cpu() && x.scalar_type() == at::kFloat, "quantize8: float32 on the CPU, got ", x.toString());
  const at::Tensor dense = x.contiguous();
  const Quantized8 q = zero_quantized(dense);
  const float* values = dense.const_data_ptr<float>();
  uint8_t* codes = q.codes.data_ptr<uint8_t>();
  float* scales = q.scales.data_ptr<float>();
  for_blocks(dense.numel(), [&](int64_t b, int64_t at, int64_t n) {
    if (map == DynamicMap::with_sign)
      adamw8::quantize_block<true>(values + at, codes + at, scales + b, n);
    else
      adamw8::quantize_block<false>(values + at, codes + at, scales + b, n);
  });
  return q;
}

at::Tensor dequantize8(const Quantized8& q, DynamicMap map) {
  check_state(q, q.codes);
  MOEGRAFT_INVARIANT(q.codes.is_cpu(), "dequantize8: on the CPU");
  const at::Tensor x = at::empty(q.codes.sizes(), q.scales.options());
  const uint8_t* codes = q.codes.const_data_ptr<uint8_t>();
  const float* scales = q.scales.const_data_ptr<float>();
  float* values = x.data_ptr<float>();
  for_blocks(x.numel(), [&](int64_t b, int64_t at, int64_t n) {
    adamw8::dequantize_block(codes + at, scales[b], dynamic_map(map).data(), values + at, n);
  });
  return x;
}

// Scales of 0 make every code a zero.
Adamw8State adamw8_zero_state(const at::Tensor& parameter) {
  return {zero_quantized(parameter), zero_quantized(parameter)};
}

void adamw8_step(const at::Tensor& parameter, const at::Tensor& grad, const Adamw8State& state,
                 const Adamw8Options& o) {
  MOEGRAFT_INVARIANT(parameter.scalar_type() == at::kFloat && parameter.is_contiguous(),
                     "adamw8: the parameter must be float32 and contiguous");
  MOEGRAFT_INVARIANT(grad.scalar_type() == at::kFloat && grad.is_contiguous() && grad.sizes() == parameter.sizes() &&
                         grad.device() == parameter.device(),
                     "adamw8: gradient ", grad.sizes(), " for a parameter ", parameter.sizes());
  MOEGRAFT_INVARIANT(o.step >= 1, "adamw8: step ", o.step);
  check_state(state.exp_avg, parameter);
  check_state(state.root, parameter);
  if (parameter.numel() == 0) return;
  const double correction1 = 1 - std::pow(o.beta1, double(o.step)), correction2 = 1 - std::pow(o.beta2, double(o.step));
  const adamw8::Factors factors{float(o.beta1),
                                float(1 - o.beta1),
                                float(o.beta2),
                                float(1 - o.beta2),
                                float(1 - o.lr * o.weight_decay),
                                float(o.lr / correction1),
                                float(1 / std::sqrt(correction2)),
                                float(o.epsilon),
                                float(o.grad_factor)};
  const adamw8::Arrays arrays{parameter.data_ptr<float>(),
                              grad.const_data_ptr<float>(),
                              state.exp_avg.codes.data_ptr<uint8_t>(),
                              state.exp_avg.scales.data_ptr<float>(),
                              state.root.codes.data_ptr<uint8_t>(),
                              state.root.scales.data_ptr<float>(),
                              parameter.numel()};
  choose(kSteps, parameter).run(factors, arrays, parameter.get_device());
  parameter.unsafeGetTensorImpl()
      ->bump_version();  // as ATen's in-place operations do, for whoever keeps something made of it
}

}  // namespace moegraft::kernels
