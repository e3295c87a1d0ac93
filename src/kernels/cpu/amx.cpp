// The bf16 micro-kernel on AMX tiles. One tile layout (eight tiles of 16 rows x 64 bytes) serves every shape; depths
// that are no multiple of 32 are completed with zeros here. Compiled for AMX and AVX-512 alone
// (third_party/cmake/Modules.cmake); includes nothing with inline functions, like loops.inc.
#include "micro_kernel.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)

#include <immintrin.h>
#include <stddef.h>

namespace moegraft::kernels::amx {
namespace {

using Term = PanelTerm<bf16>;

constexpr int64_t kRows = 16, kDepth = 32,
                  kStrip = 256;  // rows and depth of a tile; rows whose depth tails are completed at a time

// The intrinsics want literals; templates want constants.
template <int D>
inline __attribute__((always_inline)) void load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(D) : "memory");
}
template <int D>
inline __attribute__((always_inline)) void load_once(
    const void* p, int64_t stride) {  // does not displace what the first-level cache holds
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(D) : "memory");
}
template <int S>
inline __attribute__((always_inline)) void store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(S) : "memory");
}
template <int D>
inline __attribute__((always_inline)) void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(D));
}
template <int D, int A, int B>
inline __attribute__((always_inline)) void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(D), "i"(A), "i"(B));
}

// A run of depth steps: tiles of A and of the panel at a fixed distance from step to step.
struct Segment {
  const bf16* a;
  int64_t stride_a;  // bytes from row to row
  int64_t lda;       // elements
  const bf16* b;
  int64_t steps;
};

// Float rows in a buffer that become bf16 while the next block is being multiplied.
struct Rounding {
  const float* from = nullptr;  // [rows, 32]
  bf16* to = nullptr;
  int64_t ld = 0, rows = 0;
  __mmask32 columns = 0;
  bool past_cache = false;  // whole lines of a large result, which would otherwise be read before they are written

  inline __attribute__((always_inline)) void some(int64_t count) {
    for (; count > 0 && rows > 0; --count, --rows, from += 32, to += ld) {
      const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
      if (past_cache)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)both);
      else
        _mm512_mask_storeu_epi16(to, columns, (__m512i)both);
    }
  }
};

#include "fetching.inc"

// Where the accumulators of the block before go: stored between the next block's first products, which hides the
// stores.
struct Pending {
  float* c = nullptr;
  int64_t ld = 0;
};

// One block of R x C accumulators (tile r * C + c). kStreamB: the panel is too large for the first-level cache and is
// read past it, or else A is.
template <int R, int C, bool kStreamB>
struct Block {
  static_assert(R * C <= 4 && R <= 2);
  template <int T>
  static inline __attribute__((always_inline)) void start(const Pending& before, float* c, int64_t ldc,
                                                          bool accumulate) {
    const int64_t place = (T / C) * kRows, column = (T % C) * kRows;
    if (before.c) store<T>(before.c + place * before.ld + column, before.ld * 4);
    if (accumulate)
      load<T>(c + place * ldc + column, ldc * 4);
    else
      zero<T>();
  }
  template <int T>
  static inline __attribute__((always_inline)) void load_a(const void* p, int64_t stride) {
    if constexpr (kStreamB)
      load<T>(p, stride);
    else
      load_once<T>(p, stride);
  }
  template <int T>
  static inline __attribute__((always_inline)) void load_b(const void* p, int64_t stride) {
    if constexpr (kStreamB)
      load_once<T>(p, stride);
    else
      load<T>(p, stride);
  }

  template <bool kFirst>
  static inline __attribute__((always_inline)) void step(const bf16* a, const bf16* a_below, int64_t stride_a,
                                                         const bf16* b, int64_t stride_b, const Pending& before,
                                                         float* c, int64_t ldc, bool accumulate) {
    load_a<4>(a, stride_a);
    load_b<6>(b, stride_b);
    if constexpr (C == 2) load_b<7>(b + 32, stride_b);
    if constexpr (kFirst) start<0>(before, c, ldc, accumulate);
    multiply<0, 4, 6>();
    if constexpr (R == 2) load_a<5>(a_below, stride_a);
    if constexpr (C == 2) {
      if constexpr (kFirst) start<1>(before, c, ldc, accumulate);
      multiply<1, 4, 7>();
    }
    if constexpr (R == 2) {
      if constexpr (kFirst) start<C>(before, c, ldc, accumulate);
      multiply<C, 5, 6>();
      if constexpr (C == 2) {
        if constexpr (kFirst) start<3>(before, c, ldc, accumulate);
        multiply<3, 5, 7>();
      }
    }
  }

  static inline __attribute__((always_inline)) void run(const Segment* segments, int64_t count, int64_t row,
                                                        int64_t column, int64_t width, const Pending& before,
                                                        Rounding& rounding, Fetching& fetching, float* c, int64_t ldc,
                                                        bool accumulate) {
    const int64_t stride_b = width * 4;
    for (int64_t s = 0; s < count; ++s) {
      const Segment& g = segments[s];
      const bf16 *a = g.a + row * g.lda, *below = a + kRows * g.lda, *b = g.b + column * 2;
      int64_t i = 0;
      if (s == 0) {
        step<true>(a, below, g.stride_a, b, stride_b, before, c, ldc, accumulate);
        fetching.some();
        i = 1;
      }
      for (; i < g.steps; ++i) {
        step<false>(a + i * kDepth, below + i * kDepth, g.stride_a, b + i * kDepth * width, stride_b, before, c, ldc,
                    false);
        rounding.some(4);
        fetching.some();
      }
    }
  }
  static void finish(const Pending& p) {
    store<0>(p.c, p.ld * 4);
    if constexpr (C == 2) store<1>(p.c + kRows, p.ld * 4);
    if constexpr (R == 2) store<C>(p.c + kRows * p.ld, p.ld * 4);
    if constexpr (R == 2 && C == 2) store<3>(p.c + kRows * p.ld + kRows, p.ld * 4);
  }
};

// The depth tails of a strip of rows, completed with zeros.
struct Tails {
  alignas(64) bf16 a[kMostTerms][kStrip * kDepth];
  alignas(64) bf16 b[kMostTerms][kDepth * 64];
};

int64_t cut_segments(int64_t rows, int64_t row, const Term* terms, int64_t count, int64_t width, Tails& tails,
                     Segment* out) {
  int64_t n = 0;
  for (int64_t t = 0; t < count; ++t) {
    const Term& term = terms[t];
    const int64_t whole = term.depth / kDepth, rest = term.depth % kDepth;
    const bf16* a = term.a + row * term.lda;
    if (whole) out[n++] = {a, term.lda * 2, term.lda, term.panel, whole};
    if (!rest) continue;
    const __mmask32 kept = (__mmask32(1) << rest) - 1;
    for (int64_t r = 0; r < rows; ++r)
      _mm512_store_si512(tails.a[t] + r * kDepth, _mm512_maskz_loadu_epi16(kept, a + r * term.lda + whole * kDepth));
    const bf16* b = term.panel + whole * kDepth * width;
    for (int64_t i = 0; i < width * kDepth; i += 32)
      _mm512_store_si512(tails.b[t] + i, i < width * rest ? _mm512_loadu_si512(b + i) : _mm512_setzero_si512());
    out[n++] = {tails.a[t], kDepth * 2, kDepth, tails.b[t], 1};
  }
  return n;
}

struct Target {
  float* c;  // null: rounded to `out`
  int64_t ldc;
  bool accumulate;
  bf16* out;
  int64_t ld_out, columns;
  bool past_cache;
};

struct Rooms {  // two, in turn: one is filled while the other is rounded
  alignas(64) float of[2][32 * 32];
};

template <bool kStreamB>
void strip(int64_t rows, const Segment* segments, int64_t count, int64_t width, const Target& to, Rooms& rooms,
           Fetching& fetching) {
  Pending before;
  void (*finish)(const Pending&) = nullptr;
  Rounding rounding, next;
  int turn = 0;
  const auto block = [&]<int R, int C>(int64_t row, int64_t column) __attribute__((always_inline)) {
    using B = Block<R, C, kStreamB>;
    if (before.c && finish != &B::finish) {  // of another shape
      finish(before);
      before.c = nullptr;
    }
    float* c = to.c ? to.c + row * to.ldc + column : rooms.of[turn];
    const int64_t ldc = to.c ? to.ldc : 32;
    rounding = next;
    const int64_t below = rows - row, block_rows = below < R * kRows ? below : R * kRows;
    if (to.out && !to.past_cache)  // its lines, while the products run
      for (int64_t i = 0; i < block_rows; ++i) __builtin_prefetch(to.out + (row + i) * to.ld_out + column, 1, 2);
    B::run(segments, count, row, column, width, before, rounding, fetching, c, ldc, to.accumulate);
    rounding.some(32);
    before = {c, ldc};
    finish = &B::finish;
    if (to.c) return;
    turn ^= 1;
    const int64_t left = to.columns - column;
    next = {c, to.out + row * to.ld_out + column, to.ld_out, block_rows,
            left >= 32  ? ~__mmask32(0)
            : left <= 0 ? 0
                        : (__mmask32(1) << left) - 1};
    if (C == 1) next.columns &= 0xffff;
    next.past_cache = to.past_cache && next.columns == ~__mmask32(0) && !(reinterpret_cast<size_t>(next.to) % 64) &&
                      to.ld_out % 32 == 0;
  };
  for (int64_t row = 0; row < rows; row += 2 * kRows) {
    const bool two = rows - row > kRows;
    for (int64_t column = 0; column < width; column += 32) {
      if (width - column >= 32) {
        if (two)
          block.template operator()<2, 2>(row, column);
        else
          block.template operator()<1, 2>(row, column);
      } else {
        if (two)
          block.template operator()<2, 1>(row, column);
        else
          block.template operator()<1, 1>(row, column);
      }
    }
  }
  finish(before);
  next.some(32);
}

struct alignas(64) Layout {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

thread_local bool configured = false;

void set_up() {
  if (configured) return;
  const Layout layout;
  _tile_loadconfig(&layout);
  configured = true;
}

void run(int64_t m, const Term* terms, int64_t count, int64_t width, Target to, const Ahead& ahead) {
  set_up();
  Tails tails;
  Rooms rooms;
  int64_t depth = 0, steps = 0;
  for (int64_t t = 0; t < count; ++t) depth += terms[t].depth, steps += (terms[t].depth + kDepth - 1) / kDepth;
  Fetching fetching(ahead, steps * ((m + 2 * kRows - 1) / (2 * kRows)) * ((width + 31) / 32));
  for (int64_t row = 0; row < m; row += kStrip) {
    const int64_t rows = m - row < kStrip ? m - row : kStrip;
    Segment segments[2 * kMostTerms];
    const int64_t n = cut_segments(rows, row, terms, count, width, tails, segments);
    const Target at{to.c ? to.c + row * to.ldc : nullptr,
                    to.ldc,
                    to.accumulate,
                    to.out + (to.out ? row * to.ld_out : 0),
                    to.ld_out,
                    to.columns,
                    to.past_cache};
    if (rows > 2 * kRows && depth * width <= 16384)
      strip<false>(rows, segments, n, width, at, rooms, fetching);
    else
      strip<true>(rows, segments, n, width, at, rooms, fetching);
  }
}

void product(int64_t m, const Term* terms, int64_t count, int64_t width, float* c, int64_t ldc, bool accumulate,
             const Ahead& ahead) {
  run(m, terms, count, width, {c, ldc, accumulate, nullptr, 0, 0, false}, ahead);
}
void product_rounded(int64_t m, const Term* terms, int64_t count, int64_t width, bf16* out, int64_t ld_out,
                     int64_t columns, bool past_cache, const Ahead& ahead) {
  run(m, terms, count, width, {nullptr, 0, false, out, ld_out, columns, past_cache}, ahead);
  if (past_cache) _mm_sfence();
}

#include "turn.inc"

// A pair of a tile is usually two rows of the right operand. Here it is two columns of one row, as they lie in memory,
// against the pairs (t, 0) and (0, t): the two sums are those of the even and of the odd columns. Half of the
// multiplications are by zero, but `in`, which is wide, needs no other layout.
void outer(int64_t rows, const bf16* t, int64_t ldt, const float* s, int64_t columns, const bf16* in, int64_t ld,
           int64_t width, float* acc, int64_t ld_acc, bool accumulate) {
  if (width % 2)
    return avx512_bf16::kBf16Kernel.outer(rows, t, ldt, s, columns, in, ld, width, acc, ld_acc, accumulate);
  set_up();
  constexpr int64_t kMost = 512;
  alignas(64) uint32_t pairs[16 + kRows * (kMost + 16)];  // [column of t][row] as (t, 0), and room for one element
                                                          // before them: two bytes earlier lie the (0, t)
  alignas(64) float even[2][kRows * kRows], odd[2][kRows * kRows];
  for (int64_t first = 0; first < rows; first += kMost) {
    const int64_t count = rows - first < kMost ? rows - first : kMost, depth = (count + kRows - 1) / kRows * kRows,
                  ld_a = depth + 16;
    const bool add = accumulate || first > 0;
    for (int64_t c = 0; c < columns; c += kRows) {
      uint32_t* a = pairs + 16;
      for (int64_t r = 0; r < depth; r += kRows) {
        __m512i v[kRows];
        for (int64_t i = 0; i < kRows; ++i) {
          const int64_t row = first + (r + i < count ? r + i : count - 1);
          v[i] = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(t + row * ldt + c)));
          if (s)
            v[i] = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(
                _mm512_mul_ps(_mm512_set1_ps(s[row]), _mm512_castsi512_ps(_mm512_slli_epi32(v[i], 16)))));
        }
        const __mmask16 real = count - r >= kRows ? 0xffff : __mmask16((1u << (count - r)) - 1);
        turn(v);
        for (int64_t i = 0; i < kRows; ++i) _mm512_storeu_si512(a + i * ld_a + r, _mm512_maskz_mov_epi32(real, v[i]));
      }
      for (int64_t i = 0; i < kRows; ++i) a[i * ld_a - 1] = 0;
      const void *a_even = a, *a_odd = reinterpret_cast<const char*>(a) - 2;
      for (int64_t w = 0; w < width; w += 64) {
        const bool second = w + 32 < width;
        const bf16* b = in + first * ld + w;
        zero<0>();
        zero<1>();
        zero<2>();
        zero<3>();
        for (int64_t r = 0; r < depth; r += kRows) {
          load<4>(static_cast<const char*>(a_even) + r * 4, ld_a * 4);
          load<5>(static_cast<const char*>(a_odd) + r * 4, ld_a * 4);
          load_once<6>(b + r * ld, ld * 2);
          multiply<0, 4, 6>();
          multiply<1, 5, 6>();
          if (!second) continue;
          load_once<7>(b + r * ld + 32, ld * 2);
          multiply<2, 4, 7>();
          multiply<3, 5, 7>();
        }
        store<0>(even[0], 64);
        store<1>(odd[0], 64);
        store<2>(even[1], 64);
        store<3>(odd[1], 64);
        const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
                      high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        for (int half = 0; half < (second ? 2 : 1); ++half)
          for (int64_t i = 0; i < kRows; ++i) {
            const __m512 e = _mm512_load_ps(even[half] + i * kRows), o = _mm512_load_ps(odd[half] + i * kRows);
            float* to = acc + (c + i) * ld_acc + w + half * 32;
            const int64_t left = width - w - half * 32;
            __m512 x = _mm512_permutex2var_ps(e, low, o), y = _mm512_permutex2var_ps(e, high, o);
            if (add) x = _mm512_add_ps(x, _mm512_loadu_ps(to));
            _mm512_storeu_ps(to, x);
            if (left <= 16) continue;
            if (add) y = _mm512_add_ps(y, _mm512_loadu_ps(to + 16));
            _mm512_storeu_ps(to + 16, y);
          }
      }
    }
  }
}

}  // namespace

void release() {
  if (!configured) return;
  _tile_release();
  configured = false;
}

const MicroKernel<bf16> kBf16Kernel{"AMX bf16 tiles", 4, kDepth, false, 0, 128, product, product_rounded, outer};

}  // namespace moegraft::kernels::amx

#else

namespace moegraft::kernels::amx {
void release() {}
const MicroKernel<bf16> kBf16Kernel{};
}  // namespace moegraft::kernels::amx

#endif
