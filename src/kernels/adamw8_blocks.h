#pragma once
// The CPU's side of the 8-bit AdamW step: one block of values at a time.

#include <cstring>

#include "adamw8.h"

namespace moegraft::kernels::adamw8 {

// Magnitudes compare as their bits: an integer maximum vectorises, and NaN is the largest, so it is not lost.
inline float largest_magnitude(const float* x, int64_t n) {
  int32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    largest = largest > bits ? largest : bits;
  }
  float value;
  std::memcpy(&value, &largest, sizeof value);
  return value;
}

// map: the 256 numbers that a code stands for.
inline void dequantize_block(const uint8_t* codes, float scale, const float* map, float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = map[codes[i]] * scale;
}

template <bool kSigned>
void quantize_block(const float* x, uint8_t* codes, float* scale, int64_t n) {
  *scale = usable_scale(largest_magnitude(x, n));
  const float inverse = inverse_scale(*scale);
  for (int64_t i = 0; i < n; ++i)
    codes[i] = uint8_t(kSigned ? signed_code(x[i] * inverse) : unsigned_code(x[i] * inverse));
}

// Block b of the arrays.
inline void step_block(const Factors& f, const Arrays& a, int64_t b, const float* signed_map,
                       const float* unsigned_map) {
  const int64_t at = b * kBlock, n = kBlock < a.numel - at ? kBlock : a.numel - at;
  alignas(64) float exp_avg[kBlock], root[kBlock];
  dequantize_block(a.exp_avg_codes + at, a.exp_avg_scales[b], signed_map, exp_avg, n);
  dequantize_block(a.root_codes + at, a.root_scales[b], unsigned_map, root, n);
  float* parameter = a.parameter + at;
  const float* grad = a.grad + at;
  for (int64_t i = 0; i < n; ++i) update(f, grad[i], parameter[i], exp_avg[i], root[i]);
  quantize_block<true>(exp_avg, a.exp_avg_codes + at, a.exp_avg_scales + b, n);
  quantize_block<false>(root, a.root_codes + at, a.root_scales + b, n);
}

}  // namespace moegraft::kernels::adamw8
