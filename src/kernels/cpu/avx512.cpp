// Micro-kernels on AVX-512: float32, and bf16 widened in registers. Compiled for AVX-512 alone
// (third_party/cmake/Modules.cmake).
#include "micro_kernel.h"

#if defined(__AVX512F__)

#include <immintrin.h>
#include <stddef.h>

#include <utility>

namespace moegraft::kernels::avx512 {
namespace {

#include "avx512_lanes.inc"
#include "fma_kernel.inc"

}  // namespace

const MicroKernel<float> kFloatKernel{
    "AVX-512 FMA", 1, 16, true, 2 * kFewRows, 64, product<FloatOp>, product_rounded<FloatOp>, outer<FloatOuter>};
const MicroKernel<bf16> kBf16Kernel{"AVX-512 FMA on bf16 widened in registers",
                                    0.9,
                                    16,
                                    true,
                                    4 * kFewRows,
                                    64,
                                    product<WidenOp>,
                                    product_rounded<WidenOp>,
                                    outer<WidenOuter>};

}  // namespace moegraft::kernels::avx512

#else

namespace moegraft::kernels::avx512 {
const MicroKernel<float> kFloatKernel{};
const MicroKernel<bf16> kBf16Kernel{};
}  // namespace moegraft::kernels::avx512

#endif
