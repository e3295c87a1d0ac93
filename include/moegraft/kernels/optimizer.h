#pragma once
// AdamW with moments in 8 bits (block-wise dynamic quantisation, Dettmers et al., arXiv:2110.02861).
//
// The flattened tensor is cut into blocks of kAdamw8Block values. A block stores one byte per value, an index into a
// map of 256 numbers of [-1, 1] or [0, 1], and one float32 scale, its largest magnitude. Blocks of 256 where the paper
// has 2048: 1.6 % more bytes, and an outlier coarsens an eighth as many neighbours (a quarter less error of the update
// where gradients in a block differ by decades). The second moment is kept as its root, and a positive root never
// becomes 0: quantised plainly, small second moments round to 0 beside a larger one, and the update then divides by
// epsilon (the zero-point problem, arXiv:2309.01507).

#include <torch/types.h>

#include <array>

namespace moegraft::kernels {

constexpr int64_t kAdamw8Block = 256;

// The 256 numbers that a code stands for, ascending, with 0 and 1: seven decades from 1e-7 to 1, each cut into twice as
// many equal bins as the one below it, at the bins' centres. Signed (first moment): the same with both signs, of 1 only
// +1.
enum class DynamicMap { with_sign, without_sign };
const std::array<float, 256>& dynamic_map(DynamicMap map);

// codes uint8 in the tensor's shape, scales float32 [ceil(numel / kAdamw8Block)].
struct Quantized8 {
  at::Tensor codes, scales;
};
// CPU, float32. quantize8 takes the centre of the bin that holds the value (0 below 1e-7 of the scale); without_sign: x
// >= 0, and a positive x never becomes 0.
Quantized8 quantize8(const at::Tensor& x, DynamicMap map);
at::Tensor dequantize8(const Quantized8& q, DynamicMap map);

// exp_avg: first moment (with_sign); root: square root of the second moment (without_sign).
struct Adamw8State {
  Quantized8 exp_avg, root;
};
Adamw8State adamw8_zero_state(const at::Tensor& parameter);  // on the parameter's device

struct Adamw8Options {
  double lr, beta1, beta2, epsilon, weight_decay;
  int64_t step;              // this update's number, from 1: bias correction
  double grad_factor = 1.0;  // multiplies the gradient first: clipping
};
// One AdamW update in place, on the device of the parameter: a block is read, updated in float32 and written again; the
// update itself uses the moments before they are rounded. parameter and grad float32, contiguous. No host sync, nothing
// allocated; bits depend neither on threads nor on scheduling. UserError for a CUDA parameter in a build without CUDA.
void adamw8_step(const at::Tensor& parameter, const at::Tensor& grad, const Adamw8State& state,
                 const Adamw8Options& options);

}  // namespace moegraft::kernels
