#pragma once
// The inner kernels of block products (block_product.h), one for each instruction set: small sums of products over one
// panel of a right operand, no per-call set-up. Which one runs is decided in one place, cpu_path.cpp.

#include <cstdint>

#include "loops.h"

#define MOEGRAFT_INLINE inline __attribute__((always_inline))  // in the micro-kernels' own files

namespace moegraft::kernels {

// One product of a sum: A [m, depth] times a panel (block_product.h).
template <class T>
struct PanelTerm {
  const T* a;
  int64_t lda;
  const T* panel;
  int64_t depth;
  const uint8_t* q8_0 = nullptr;  // instead of `panel`: its blocks (formats/q8_0.cpp), dequantised in registers. For at
                                  // most few_rows rows
};

// Cache lines that a micro-kernel asks for beside its products, a few at a time: what is worked on next comes from
// memory at the pace of the products.
struct Range {
  const void* at = nullptr;
  int64_t bytes = 0;
};
struct Ahead {
  static constexpr int kMost = 3;
  Range of[kMost];
  int count = 0;
  void add(Range r) {
    if (r.bytes > 0 && count < kMost) of[count++] = r;
  }
};

constexpr int64_t kMostTerms = 4;

template <class T>
struct MicroKernel {
  bool built() const { return product != nullptr; }

  const char* name;
  double times_float;  // products a second beside the float32 kernel's on such a machine, roughly
  int64_t depth_step;  // a depth costs as much as the next multiple of this
  bool turns;  // large weights may lie in one layout for both passes: turning a panel costs little beside its products
  int64_t few_rows;  // up to which a product reads a quantised panel's blocks itself, with the bits of the dequantised
                     // panel; 0: never
  int64_t block_rows;  // rows to take at a time where a product's float32 block is worked on in the caches

  // C [m, width] (+)= the sum of at most kMostTerms products; width, the panels', is a multiple of 16 and at most 64. A
  // and C have round_up(m, 16) rows, of which those beyond m may be read and written. The order of an element's sum
  // depends on the depths alone. What is in C is added last: a sum taken in parts has shorter chains and smaller
  // errors.
  void (*product)(int64_t m, const PanelTerm<T>* terms, int64_t count, int64_t width, float* c, int64_t ldc,
                  bool accumulate, const Ahead& ahead);
  // The same rounded to T: exactly [m, columns] is written, columns <= width. past_cache: results too many to stay in
  // the cache are better not read into it first.
  void (*product_rounded)(int64_t m, const PanelTerm<T>* terms, int64_t count, int64_t width, T* out, int64_t ld_out,
                          int64_t columns, bool past_cache, const Ahead& ahead);
  // acc [columns, width] (+)= sum over rows r of s[r] t[r, :]^T in[r, :], columns a multiple of 16; s null: ones. s t
  // is rounded to T. `in` is read as it lies and must be finite in round_up(rows, 16) rows; acc has round_up(width, 16)
  // columns, of which those beyond width become anything finite.
  void (*outer)(int64_t rows, const T* t, int64_t ldt, const float* s, int64_t columns, const T* in, int64_t ld,
                int64_t width, float* acc, int64_t ld_acc, bool accumulate);
};

// This process's; null where there is none: ATen then.
template <class T>
const MicroKernel<T>* micro_kernel();

// Empty where the build has no such instructions; whether the machine has them is asked elsewhere (cpu_path.cpp), by
// code that every machine can run.
namespace amx {
extern const MicroKernel<bf16> kBf16Kernel;
void release();  // the thread's tiles, which a product sets up where they are not. Nothing else that uses tiles may run
                 // between
}  // namespace amx
namespace avx512_bf16 {
extern const MicroKernel<bf16> kBf16Kernel;
}  // namespace avx512_bf16
namespace avx512 {
extern const MicroKernel<float> kFloatKernel;
extern const MicroKernel<bf16> kBf16Kernel;
}  // namespace avx512
namespace avx2 {
extern const MicroKernel<float> kFloatKernel;
extern const MicroKernel<bf16> kBf16Kernel;
}  // namespace avx2

}  // namespace moegraft::kernels
