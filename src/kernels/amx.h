#pragma once
// The bf16 micro-kernel on AMX tiles: sums of products over one panel of a right operand (block_product.h), no per-call set-up.
// One tile layout (eight tiles of 16 rows x 64 bytes) serves every shape; depths that are no multiple of 32 are completed with zeros here.

#include <cstdint>

#include "loops.h"
#include "micro_kernel.h"

namespace moegraft::kernels::amx {

using Term = PanelTerm<bf16>;  // panel [depth/2][width][2], depth even; A must have round_up(m, 16) readable rows
constexpr int64_t kMostTerms = 4;

// Whether the build has the kernel; whether the machine has it is asked elsewhere, by code that every machine can run.
bool built();

// The thread's tiles: product() sets them up where they are not, release() gives them back. Nothing else that uses tiles may run between.
void release();

// C [m, width] (+)= the sum of at most kMostTerms products, width a multiple of 16, at most 64. Writes round_up(m, 16) rows. The order of sums depends on the
// depths alone.
void product(int64_t m, const Term* terms, int64_t count, int64_t width, float* c, int64_t ldc, bool accumulate, const Ahead& ahead);
// The same rounded to bf16: exactly [m, columns] is written, columns <= width. past_cache: results too many to stay in the cache are
// better not read into it first.
void product_rounded(int64_t m, const Term* terms, int64_t count, int64_t width, bf16* out, int64_t ld_out, int64_t columns, bool past_cache, const Ahead& ahead);

// acc [columns, width] (+)= sum over rows r of s[r] t[r, :]^T in[r, :], columns a multiple of 16. s t is rounded to bf16; s null: ones. `in` is read as it
// lies, whole 64-byte pieces of round_up(rows, 16) rows, and must be finite there; acc has round_up(width, 16) columns, of which those beyond width become
// anything finite.
void outer(int64_t rows, const bf16* t, int64_t ldt, const float* s, int64_t columns, const bf16* in, int64_t ld, int64_t width, float* acc, int64_t ld_acc, bool accumulate);

}  // namespace moegraft::kernels::amx
