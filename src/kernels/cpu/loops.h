#pragma once
// Element-wise loops of the CPU paths on raw rows, compiled once per instruction set (loops_v3.cpp, loops_v4.cpp,
// loops_v4_bf16.cpp) and chosen at run time. Arithmetic is float32; bf16 is the upper half of a float, rounded to
// nearest even. Nothing here allocates or starts threads.

#include <cstdint>

namespace moegraft::kernels {

struct bf16 {
  uint16_t bits;
};

// For one element type T (float or bf16) of the compute dtype. ld: elements from row to row.
template <class T>
struct Loops {
  void (*from_float)(const float* in, float factor, T* out, int64_t n);  // out = T(in * factor)
  void (*scale_rows)(const float* in, int64_t ld_in, float factor, T* out, int64_t ld_out, int64_t rows,
                     int64_t n);  // as from_float, row by row
  void (*round_rows)(const float* in, int64_t ld_in, T* out, int64_t ld_out, int64_t rows, int64_t n);
  void (*to_float)(const T* in, float* out, int64_t n);
  float (*dot)(const T* a, const T* b, int64_t n);
  // One query against the keys of a cache: out[s] = <q, keys[s]>, keys [count, n]; and its sum over the values: out =
  // T(sum_s w[s] rows[s]), rows [count, n].
  void (*dots)(const T* q, const T* keys, int64_t ld, int64_t count, int64_t n, float* out);
  void (*weighted_rows)(const float* w, const T* rows, int64_t ld, int64_t count, T* out, int64_t n);

  // A B operand [k, n] as a panel: [k/pair][panel_n][pair], zero beyond the source (block_product.h). The source is [k,
  // n] or, for _nk, [n, k].
  void (*pack_kn)(const T* in, int64_t ld, int64_t k, int64_t n, T* panel, int64_t panel_k, int64_t panel_n);
  void (*pack_nk)(const T* in, int64_t ld, int64_t k, int64_t n, T* panel, int64_t panel_k, int64_t panel_n);
  // [k/pair][in_width][pair] -> [n/pair][out_width][pair]: a part of W's panel as one of its transpose.
  void (*turn_panel)(const T* in, int64_t in_width, int64_t k, int64_t n, T* out, int64_t out_width);
  // Q8_0 (formats/q8_0.cpp): q [rows, width] times each column's float16 scale, as a panel [rows/pair][width][pair];
  // width a multiple of 16, rows whole pairs.
  void (*dequantise_q8_0)(const void* scales, const int8_t* q, int64_t width, int64_t rows, T* out);
  // From float32, times factor. strip_nk lays out 16 columns, of which n <= 16 are the source's, in rows [first, first
  // + k).
  void (*pack_kn_float)(const float* in, int64_t ld, int64_t k, int64_t n, float factor, T* panel, int64_t panel_k,
                        int64_t panel_n);
  void (*strip_nk_float)(const float* in, int64_t ld, int64_t k, int64_t n, float factor, int64_t first, T* strip,
                         int64_t panel_k, int64_t panel_n);

  // g, u [rows, n] float32 -> both in T (past the cache on request, if aligned), and h = silu(g) * u.
  void (*swiglu)(const float* g, const float* u, int64_t ld_in, T* g_out, T* u_out, int64_t ld_out, T* h, int64_t ld_h,
                 int64_t rows, int64_t n, bool past_cache);
  // dh [rows, n]: gradient of h before the row's weight w. h again, dg = w dh u silu'(g), du = w dh silu(g); dw[row] +=
  // <h, dh>.
  void (*swiglu_backward)(const float* dh, int64_t ld_dh, const T* g, const T* u, int64_t ld_in, const float* w, T* h,
                          T* dg, T* du, int64_t ld_out, float* dw, int64_t rows, int64_t n);
  // out = T(sum_i w[i] * rows[i]).
  void (*weighted_sum)(const T* const* rows, const float* w, int64_t count, T* out, int64_t n);

  // x_out = x + delta (delta null: x); y = T(w * x_out * rstd), also in float when y_float is given. Returns rstd.
  float (*residual_norm)(const float* x, const T* delta, float* x_out, const float* w, float eps, T* y, float* y_float,
                         int64_t n);
  // dx = dx_out + J^T (dy + dy_float); each of the three may be null. ddelta = T(dx) when given.
  void (*residual_norm_backward)(const float* dx_out, const T* dy, const float* dy_float, const float* x,
                                 const float* w, float rstd, float* dx, T* ddelta, int64_t n);

  // y = w * T(x * rstd) and its gradient for x; returns rstd.
  float (*rms_norm)(const T* x, const T* w, float eps, T* y, int64_t n);
  void (*rms_norm_backward)(const T* dy, const T* x, const T* w, float rstd, T* dx, int64_t n);
  // The two halves of a head: (a, b) -> (a cos - sign b sin, b cos + sign a sin).
  void (*rotate)(const T* x, const float* cos, const float* sin, float sign, T* y, int64_t half);
  void (*transpose)(const T* in, int64_t ld, int64_t rows, int64_t columns, T* out, int64_t ld_out);

  // scale > 0. *max becomes the larger of itself and every scale * s[j], j in [first, last); p[j] = T(exp(scale * s[j]
  // - *max)) there, zero elsewhere in [0, padded). Returns the sum of p.
  float (*softmax)(const float* s, float scale, int64_t first, int64_t last, int64_t padded, T* p, float* max);
  // p = exp(scale * s - lse), ds = scale * p * (dp - delta) for i in [first, last), zero elsewhere in [0, padded).
  void (*softmax_backward)(const float* s, const float* dp, const float* lse, const float* delta, float scale,
                           int64_t first, int64_t last, int64_t padded, T* p, T* ds);
  // Log-sum-exp of logits [n]; d, when given: T(scale * (softmax - [target])), zero in [n, padded).
  float (*cross_entropy)(const float* logits, int64_t n, int64_t padded, int64_t target, float scale, T* d);
  // The indices of the k largest of p [n], none negative, in falling order, of equal ones the lower first. Where no
  // comparable value is left (NaN): the place's own number.
  void (*top_k)(const float* p, int64_t n, int64_t k, int64_t* ids);
};

// Of the widest set that this process may use (cpu_path.h).
template <class T>
const Loops<T>& loops();

namespace v3 {
extern const Loops<float> kFloatLoops;
extern const Loops<bf16> kBf16Loops;
}  // namespace v3
namespace v4 {
extern const Loops<float> kFloatLoops;
extern const Loops<bf16> kBf16Loops;
}  // namespace v4
namespace v4_bf16 {
extern const Loops<float> kFloatLoops;
extern const Loops<bf16> kBf16Loops;
}  // namespace v4_bf16

}  // namespace moegraft::kernels
