// Micro-kernels on AVX2 and FMA: float32, and bf16 widened in registers. Compiled for that alone
// (third_party/cmake/Modules.cmake).
#include "micro_kernel.h"

#if defined(__AVX2__) && defined(__FMA__)

#include <immintrin.h>
#include <stddef.h>

#include <utility>

namespace moegraft::kernels::avx2 {
namespace {

// Vectors of 8 floats. A mask is that of maskload: the sign bit of each lane.
using Vector = __m256;
struct Mask {
  int64_t lanes;
};
constexpr int64_t kVector = 8, kMostVectors = 8;
// Accumulators of 16 registers: 12 beside two vectors of the panel and one of A (widening also wants a mask: 10). Few
// rows are taken by more vectors at a time, so that there are as many sums as multiplications take cycles.
constexpr int64_t most_rows(int64_t vectors, bool widens) {
  return vectors == 8 ? 1 : vectors == 4 ? 2 : vectors == 2 ? (widens ? 5 : 6) : 10;
}
constexpr int64_t most_vectors(int64_t rows, bool /*widens*/) { return rows == 1 ? 8 : rows == 2 ? 4 : 2; }

alignas(64) constexpr int32_t kMasks[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
MOEGRAFT_INLINE Mask mask_of(int64_t n) { return {n}; }
MOEGRAFT_INLINE __m256i bits(Mask m) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMasks + kVector - m.lanes));
}
MOEGRAFT_INLINE Vector zero() { return _mm256_setzero_ps(); }
MOEGRAFT_INLINE Vector load(const float* p) { return _mm256_loadu_ps(p); }
MOEGRAFT_INLINE Vector load(const float* p, Mask m) {
  return m.lanes == kVector ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, bits(m));
}
MOEGRAFT_INLINE void store(Vector v, float* p) { _mm256_storeu_ps(p, v); }
MOEGRAFT_INLINE void store(Vector v, float* p, Mask m) {
  if (m.lanes == kVector)
    _mm256_storeu_ps(p, v);
  else
    _mm256_maskstore_ps(p, bits(m), v);
}
MOEGRAFT_INLINE Vector load_halves(const void* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
MOEGRAFT_INLINE Vector load_bytes(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
MOEGRAFT_INLINE Vector product_of(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
MOEGRAFT_INLINE Vector broadcast(const char* p) {
  float x;
  __builtin_memcpy(&x, p, 4);
  return _mm256_set1_ps(x);
}
MOEGRAFT_INLINE Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
MOEGRAFT_INLINE Vector times(Vector a, float b) { return _mm256_mul_ps(a, _mm256_set1_ps(b)); }
MOEGRAFT_INLINE Vector multiply_add(Vector acc, Vector a, Vector b) { return _mm256_fmadd_ps(a, b, acc); }
// The lower and the upper bf16 of each of 8 pairs.
MOEGRAFT_INLINE Vector widen_low(const float* pairs) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs)), 16));
}
MOEGRAFT_INLINE Vector widen_high(const float* pairs) {
  return _mm256_and_ps(_mm256_loadu_ps(pairs), _mm256_castsi256_ps(_mm256_set1_epi32(int(0xffff0000))));
}
MOEGRAFT_INLINE Vector widen(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
// n bf16 as floats; the vector that n ends in is completed with zeros.
MOEGRAFT_INLINE void widen_row(const bf16* in, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kVector <= n; i += kVector)
    _mm256_storeu_ps(out + i, widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  if (i == n) return;
  bf16 rest[kVector] = {};
  __builtin_memcpy(rest, in + i, size_t(n - i) * sizeof(bf16));
  _mm256_storeu_ps(out + i, widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rest))));
}
// To nearest even, as loops.inc does.
MOEGRAFT_INLINE __m128i narrow(Vector v) {
  const __m256i u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i high = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
MOEGRAFT_INLINE Vector rounded_to_bf16(Vector v) { return widen(narrow(v)); }
template <int W>
MOEGRAFT_INLINE void store_rounded(const Vector (&v)[W], float* out, Mask last, bool) {
  for (int w = 0; w < W; ++w) store(v[w], out + w * kVector, w + 1 < W ? mask_of(kVector) : last);
}
template <int W>
MOEGRAFT_INLINE void store_rounded(const Vector (&v)[W], bf16* out, Mask last, bool past_cache) {
  if constexpr (W == 2)  // half a line: its other half follows soon
    if (past_cache && last.lanes == kVector && reinterpret_cast<size_t>(out) % 32 == 0)
      return _mm256_stream_si256(reinterpret_cast<__m256i*>(out),
                                 _mm256_inserti128_si256(_mm256_castsi128_si256(narrow(v[0])), narrow(v[1]), 1));
  for (int w = 0; w < W; ++w) {
    const __m128i both = narrow(v[w]);
    if (w + 1 < W || last.lanes == kVector)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + w * kVector), both);
    else
      __builtin_memcpy(out + w * kVector, &both, size_t(last.lanes) * sizeof(bf16));
  }
}
MOEGRAFT_INLINE void order_stores() { _mm_sfence(); }

#include "fma_kernel.inc"

}  // namespace

const MicroKernel<float> kFloatKernel{
    "AVX2 FMA", 1, 16, true, 2 * kFewRows, 64, product<FloatOp>, product_rounded<FloatOp>, outer<FloatOuter>};
const MicroKernel<bf16> kBf16Kernel{"AVX2 FMA on bf16 widened in registers",
                                    0.9,
                                    16,
                                    true,
                                    4 * kFewRows,
                                    64,
                                    product<WidenOp>,
                                    product_rounded<WidenOp>,
                                    outer<WidenOuter>};

}  // namespace moegraft::kernels::avx2

#else

namespace moegraft::kernels::avx2 {
const MicroKernel<float> kFloatKernel{};
const MicroKernel<bf16> kBf16Kernel{};
}  // namespace moegraft::kernels::avx2

#endif
