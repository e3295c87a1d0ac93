#pragma once
// The arithmetic of the 8-bit AdamW step, one source for the CPU loop and the CUDA kernel (C++17). Sums of products are
// written as fma and no other product meets a sum, so neither compiler has a contraction left to choose and both sides
// give the same bits.

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define MOEGRAFT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MOEGRAFT_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace moegraft::kernels::adamw8 {

constexpr int kBlock = 256;

// Decade i of the map, [10^(i-7), 10^(i-6)), has 2^(i + kShift) bins. Signed: kShift 0, its 127 bins exist twice.
// Unsigned: kShift 1, 254 bins. A magnitude's index counts from 0 for zero through the bins to kBins + 1 for one.
constexpr int kDecades = 7;
constexpr double kTop[kDecades] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
template <int kShift>
constexpr int kBins = (1 << (kShift + kDecades)) - (1 << kShift);

// In decade i, n + (bin within the decade), not yet rounded down: 2n at its top, where the next decade starts with that
// count.
template <int kShift, int i>
MOEGRAFT_HOST_DEVICE float position(float x) {
  constexpr float kPerUnit = float(double(1 << (i + kShift)) / (0.9 * kTop[i])),
                  kStart = float(double(1 << (i + kShift)) * (8.0 / 9.0));
  return std::fma(x, kPerUnit, kStart);
}
MOEGRAFT_HOST_DEVICE float smaller(float a, float b) { return a < b ? a : b; }

// Index of the bin that holds the magnitude x in [0, 1]; 0 below the first. Each decade's line is flatter than the one
// before it, so the lines join to a concave curve, which is the least of them: no search and no branch.
template <int kShift>
MOEGRAFT_HOST_DEVICE int32_t index_of(float x) {
  constexpr int kEnd = 1 << (kShift + kDecades);
  float p = float(kEnd) - 0.5f;  // also what NaN leaves here: its conversion to an integer would be undefined
  p = smaller(position<kShift, 0>(x), p);
  p = smaller(position<kShift, 1>(x), p);
  p = smaller(position<kShift, 2>(x), p);
  p = smaller(position<kShift, 3>(x), p);
  p = smaller(position<kShift, 4>(x), p);
  p = smaller(position<kShift, 5>(x), p);
  p = smaller(position<kShift, 6>(x), p);
  constexpr float kLast = float(1.0 - 0.45 / double(kEnd));  // half way between the last centre and 1
  return int32_t(p) + (1 - (1 << kShift)) + int32_t(x >= kLast);
}

template <int kShift>
MOEGRAFT_HOST_DEVICE float value_of_index(int32_t index) {
  if (index == 0) return 0.0f;
  if (index > kBins<kShift>) return 1.0f;
  const int32_t n_plus_bin = index + (1 << kShift) - 1;
  int32_t n = 1 << (kShift + kDecades - 1);
  float top = 1.0f;
  while (n > n_plus_bin) {
    n /= 2;
    top /= 10.0f;
  }
  return top * (0.1f + (0.9f * (float(n_plus_bin - n) + 0.5f)) / float(n));
}

// Codes of x in [-1, 1]: 127 is zero; of x in [0, 1]: 0 is zero, and no positive x has it.
MOEGRAFT_HOST_DEVICE int32_t signed_code(float x) {
  const int32_t index = index_of<0>(std::fabs(x)), negative = x < 0.0f ? -1 : 0,
                most = 128 + negative;  // -1 is not in the map
  return 127 + (((index < most ? index : most) ^ negative) - negative);
}
MOEGRAFT_HOST_DEVICE int32_t unsigned_code(float x) {
  const int32_t index = index_of<1>(x), least = int32_t(x > 0.0f);
  return index > least ? index : least;
}
MOEGRAFT_HOST_DEVICE float signed_value(int32_t code) {
  return code < 127 ? -value_of_index<0>(127 - code) : value_of_index<0>(code - 127);
}
MOEGRAFT_HOST_DEVICE float unsigned_value(int32_t code) { return value_of_index<1>(code); }

// A block is divided by its scale before coding. A scale below float32's normal range counts as 0.
MOEGRAFT_HOST_DEVICE float usable_scale(float absmax) { return absmax < 1.17549435e-38f ? 0.0f : absmax; }
MOEGRAFT_HOST_DEVICE float inverse_scale(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

struct Factors {
  float beta1, rest1, beta2, rest2;  // rest = 1 - beta
  float decay;                       // 1 - lr * weight_decay
  float step_size;                   // lr / (1 - beta1^t)
  float root_factor;                 // 1 / sqrt(1 - beta2^t)
  float epsilon, grad_factor;
};

MOEGRAFT_HOST_DEVICE void update(const Factors& f, float grad, float& parameter, float& exp_avg, float& root) {
  const float g = grad * f.grad_factor;
  exp_avg = std::fma(f.beta1, exp_avg, f.rest1 * g);
  root = std::sqrt(std::fma(f.beta2 * root, root, (f.rest2 * g) * g));
  const float direction = exp_avg / std::fma(root, f.root_factor, f.epsilon);
  parameter = std::fma(-f.step_size, direction, parameter * f.decay);
}

// What a backend works on: flat arrays, codes one byte per value, scales one per block.
struct Arrays {
  float* parameter;
  const float* grad;
  uint8_t* exp_avg_codes;
  float* exp_avg_scales;
  uint8_t* root_codes;
  float* root_scales;
  int64_t numel;
};
// On the current stream of the device. The stub of builds without CUDA throws.
void step_cuda(const Factors& factors, const Arrays& arrays, int device);

}  // namespace moegraft::kernels::adamw8
