#pragma once
// The float32 micro-kernel on AVX-512: sums of products over one panel of a right operand (block_product.h), no per-call set-up. Six rows by 64 columns (14 by
// 32, 14 by 16) stay in registers from the first term to the last; each element is one chain of fused multiply-adds (added to what
// is there at its end), so its bits depend on its own row and column alone.

#include <cstdint>

#include "micro_kernel.h"

namespace moegraft::kernels::avx512 {

using Term = PanelTerm<float>;  // panel [depth][width]

// Whether the build has the kernel; whether the machine has AVX-512 is asked elsewhere, by code that every machine can run.
bool built();

// C [m, columns] (+)= the sum of `count` products; width, that of the panels, is a multiple of 16 and at most 64, columns <= width.
void product(int64_t m, const Term* terms, int64_t count, int64_t width, float* c, int64_t ldc, int64_t columns, bool accumulate, const Ahead& ahead);

// acc [columns, width] (+)= sum over rows r of s[r] t[r, :]^T in[r, :]; s null: ones.
void outer(int64_t rows, const float* t, int64_t ldt, const float* s, int64_t columns, const float* in, int64_t ld, int64_t width, float* acc, int64_t ld_acc, bool accumulate);

}  // namespace moegraft::kernels::avx512
