// Compiled for AVX-512 alone (third_party/cmake/Modules.cmake); includes nothing with inline functions, like loops.inc.
#include "avx512.h"

#if defined(__AVX512F__)

#include <immintrin.h>
#include <stddef.h>

#include <utility>

namespace moegraft::kernels::avx512 {
namespace {

#include "fetching.inc"

constexpr int64_t kVector = 16, kSteps = 4;  // depth unrolled

// Rows of a block of `vectors` vectors: 24, 28, 14 accumulators of 32 registers, and what one step loads stays within two loads a cycle.
constexpr int64_t most_rows(int64_t vectors) { return vectors == 4 ? 6 : 14; }

struct Target {
  float* c;
  int64_t ldc;
  bool accumulate;
  __mmask16 last;  // columns of the last vector
};

// R rows by W vectors. kAcross: the left operand lies [depth][rows].
template <int R, int W, bool kAcross>
struct Block {
  struct Rows {  // x86 addresses base + {0, 1, 2} * stride: a pointer for three rows
    const float* p[(R + 2) / 3];
    int64_t lda;
    template <int I>
    inline __attribute__((always_inline)) const float& at(int64_t k) const {
      if constexpr (kAcross) return p[0][k * lda + I];
      else return p[I / 3][(I % 3) * lda + k];
    }
  };
  template <int I>
  static inline __attribute__((always_inline)) void row(__m512 (&acc)[R][W], const __m512 (&b)[W], const Rows& a, int64_t k) {
    const __m512 x = _mm512_set1_ps(a.template at<I>(k));
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) acc[I][w] = _mm512_fmadd_ps(x, b[w], acc[I][w]);
    if constexpr (I + 1 < R) row<I + 1>(acc, b, a, k);
  }
  static inline __attribute__((always_inline)) void step(__m512 (&acc)[R][W], const Rows& a, int64_t k, const float* b, __mmask16 last) {
    __m512 v[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) v[w] = kAcross && w + 1 == W ? _mm512_maskz_loadu_ps(last, b + w * kVector) : _mm512_loadu_ps(b + w * kVector);
    row<0>(acc, v, a, k);
  }

  static void run(const Term* terms, int64_t count, int64_t first_row, int64_t column, int64_t ldb, Target to, Fetching& fetching) {
    __m512 acc[R][W];
#pragma GCC unroll 14
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) acc[i][w] = _mm512_setzero_ps();
    int64_t asked = 0;  // rows of C whose lines are on their way: stores that miss would hold up the next block
    for (int64_t t = 0; t < count; ++t) {
      const Term& term = terms[t];
      Rows a;
      a.lda = term.lda;
      if constexpr (kAcross) a.p[0] = term.a + first_row;
      else {
#pragma GCC unroll 5
        for (int i = 0; i < (R + 2) / 3; ++i) a.p[i] = term.a + (first_row + 3 * i) * term.lda;
      }
      const float* b = term.panel + column;
      int64_t k = 0;
      for (; k + kSteps <= term.depth; k += kSteps) {
#pragma GCC unroll 4
        for (int u = 0; u < kSteps; ++u) step(acc, a, k + u, b + u * ldb, to.last);
        b += kSteps * ldb;
        fetching.some();
        if (asked < R) {
#pragma GCC unroll 4
          for (int w = 0; w < W; ++w) _mm_prefetch(to.c + asked * to.ldc + w * kVector, _MM_HINT_T0);
          ++asked;
        }
      }
      for (; k < term.depth; ++k, b += ldb) step(acc, a, k, b, to.last);
    }
#pragma GCC unroll 14
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) {
        float* c = to.c + i * to.ldc + w * kVector;
        const __mmask16 columns = w + 1 == W ? to.last : __mmask16(-1);
        // What is there is added last: a sum taken in parts has shorter chains and smaller errors.
        if (to.accumulate) acc[i][w] = _mm512_add_ps(acc[i][w], _mm512_maskz_loadu_ps(columns, c));
        _mm512_mask_storeu_ps(c, columns, acc[i][w]);
      }
  }
};

using Run = void (*)(const Term*, int64_t, int64_t, int64_t, int64_t, Target, Fetching&);

template <int W, bool kAcross, int... R>
Run one_of(int64_t rows, std::integer_sequence<int, R...>) {
  static constexpr Run kOf[] = {&Block<R + 1, W, kAcross>::run...};
  return kOf[rows - 1];
}

// `columns` columns from `column` on, in blocks of near-equal height.
template <int W, bool kAcross>
void cover_columns(int64_t m, const Term* terms, int64_t count, int64_t column, int64_t ldb, Target to, Fetching& fetching) {
  const int64_t blocks = (m + most_rows(W) - 1) / most_rows(W), height = m / blocks, taller = m % blocks;
  for (int64_t i = 0, row = 0; i < blocks; ++i) {
    const int64_t rows = height + (i < taller);
    one_of<W, kAcross>(rows, std::make_integer_sequence<int, int(most_rows(W))>())(terms, count, row, column, ldb, {to.c + row * to.ldc + column, to.ldc, to.accumulate, to.last}, fetching);
    row += rows;
  }
}

// C [m, columns]; ldb: of the right operands.
template <bool kAcross>
void cover(int64_t m, const Term* terms, int64_t count, int64_t ldb, float* c, int64_t ldc, int64_t columns, bool accumulate, const Ahead& ahead) {
  const auto vectors_at = [&](int64_t column) { const int64_t v = (columns - column + kVector - 1) / kVector; return v >= 4 ? 4 : v >= 2 ? 2 : 1; };
  int64_t steps = 0, groups = 0;
  for (int64_t t = 0; t < count; ++t) steps += terms[t].depth / kSteps;
  for (int64_t column = 0; column < columns; column += vectors_at(column) * kVector) groups += (m + most_rows(vectors_at(column)) - 1) / most_rows(vectors_at(column));
  Fetching fetching(ahead, steps * groups);
  for (int64_t column = 0; column < columns;) {
    const int64_t vectors = vectors_at(column), left = columns - column, beyond = vectors * kVector - left;
    const Target to{c, ldc, accumulate, beyond <= 0 ? __mmask16(-1) : __mmask16((1u << (kVector - beyond)) - 1)};
    if (vectors == 4) cover_columns<4, kAcross>(m, terms, count, column, ldb, to, fetching);
    else if (vectors == 2) cover_columns<2, kAcross>(m, terms, count, column, ldb, to, fetching);
    else cover_columns<1, kAcross>(m, terms, count, column, ldb, to, fetching);
    column += vectors * kVector;
  }
}

}  // namespace

bool built() { return true; }

void product(int64_t m, const Term* terms, int64_t count, int64_t width, float* c, int64_t ldc, int64_t columns, bool accumulate, const Ahead& ahead) {
  cover<false>(m, terms, count, width, c, ldc, columns, accumulate, ahead);
}

void outer(int64_t rows, const float* t, int64_t ldt, const float* s, int64_t columns, const float* in, int64_t ld, int64_t width, float* acc, int64_t ld_acc, bool accumulate) {
  constexpr int64_t kMost = 128, kWide = 32;  // rows and columns of t that are scaled at a time
  if (!s) {
    const Term term{t, ldt, in, rows};
    return cover<true>(columns, &term, 1, ld, acc, ld_acc, width, accumulate, {});
  }
  alignas(64) float scaled[kMost * kWide];
  for (int64_t first = 0; first < rows; first += kMost) {
    const int64_t count = rows - first < kMost ? rows - first : kMost;
    for (int64_t c = 0; c < columns; c += kWide) {
      const int64_t taken = columns - c < kWide ? columns - c : kWide;
      for (int64_t r = 0; r < count; ++r)
        for (int64_t i = 0; i < taken; ++i) scaled[r * kWide + i] = s[first + r] * t[(first + r) * ldt + c + i];
      const Term term{scaled, kWide, in + first * ld, count};
      cover<true>(taken, &term, 1, ld, acc + c * ld_acc, ld_acc, width, accumulate || first > 0, {});
    }
  }
}

}  // namespace moegraft::kernels::avx512

#else

namespace moegraft::kernels::avx512 {
bool built() { return false; }
void product(int64_t, const Term*, int64_t, int64_t, float*, int64_t, int64_t, bool, const Ahead&) {}
void outer(int64_t, const float*, int64_t, const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t, bool) {}
}  // namespace moegraft::kernels::avx512

#endif
