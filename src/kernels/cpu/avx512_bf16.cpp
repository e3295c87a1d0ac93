// The bf16 micro-kernel on AVX-512 with products of bf16 pairs (vdpbf16ps). Compiled for that alone
// (third_party/cmake/Modules.cmake).
#include "micro_kernel.h"

#if defined(__AVX512BF16__)

#include <immintrin.h>
#include <stddef.h>

#include <utility>

namespace moegraft::kernels::avx512_bf16 {
namespace {

#include "avx512_lanes.inc"
#include "fma_kernel.inc"

// A unit is two bf16, multiplied with two of A and summed by one instruction (which takes denormals for zero).
struct PairOp {
  using T = bf16;
  static constexpr int64_t kDeep = 2;
  static constexpr int kParts = 1;
  static constexpr bool kWidensLeft = false;
  template <int P>
  static MOEGRAFT_INLINE Vector part(const float* b) {
    return load(b);
  }
  template <int P>
  static MOEGRAFT_INLINE Vector part(const int8_t* q, int64_t ld, Vector scale) {
    alignas(64) static constexpr uint16_t kPairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512bh both = _mm512_cvtne2ps_pbh(product_of(load_bytes(q + ld), scale), product_of(load_bytes(q), scale));
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(kPairs), (__m512i)both));
  }
  static MOEGRAFT_INLINE Vector multiply(Vector acc, Vector a, Vector b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
  }
};

// Rows r and r + 1 as pairs; of an odd last one, with zeros.
struct PairOuter {
  using Op = PairOp;
  using In = bf16;
  static constexpr bool kInPlace = false;
  static void left(const bf16* t, int64_t ldt, const float* s, int64_t rows, int64_t columns, bf16* out) {
    const auto at = [&](int64_t r, int64_t i) {
      if (r >= rows) return _mm256_setzero_si256();
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(t + r * ldt + i));
      return s ? narrow(times(widen(v), s[r])) : v;
    };
    for (int64_t r = 0; r < rows; r += 2)
      for (int64_t i = 0; i < columns; i += kVector)
        _mm512_store_si512(out + r * kOuterColumns + 2 * i, pairs(at(r, i), at(r + 1, i)));
  }
  static void right(const bf16* in, int64_t ld, int64_t rows, int64_t width, bf16* out) {
    for (int64_t r = 0; r < rows; r += 2)
      for (int64_t i = 0; i < width; i += kVector) {
        const Mask real = mask_of(width - i < kVector ? width - i : kVector);
        const bf16* at = in + r * ld + i;
        _mm512_store_si512(out + r * kOuterWidth + 2 * i,
                           pairs(_mm256_maskz_loadu_epi16(real, at),
                                 r + 1 < rows ? _mm256_maskz_loadu_epi16(real, at + ld) : _mm256_setzero_si256()));
      }
  }
  static MOEGRAFT_INLINE __m512i pairs(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  }
};

}  // namespace

const MicroKernel<bf16> kBf16Kernel{"AVX-512 BF16 (vdpbf16ps)",
                                    1.8,
                                    16,
                                    true,
                                    4 * kFewRows,
                                    64,
                                    product<PairOp>,
                                    product_rounded<PairOp>,
                                    outer<PairOuter>};

}  // namespace moegraft::kernels::avx512_bf16

#else

namespace moegraft::kernels::avx512_bf16 {
const MicroKernel<bf16> kBf16Kernel{};
}  // namespace moegraft::kernels::avx512_bf16

#endif
