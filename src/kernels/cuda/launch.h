#pragma once
// Starts a functor of the kernel headers on a stream. Defined and instantiated in the .cu files, one per family of
// kernels, so that only those need nvcc.

#include <cstdint>

struct CUstream_st;

namespace moegraft::kernels::cuda {

// One thread per index in [0, count). Never waits; a launch that fails throws c10::Error.
template <class F>
void launch_threads(const F& f, int64_t count, CUstream_st* stream);
// One team of F::kLanes lanes per row in [0, count).
template <class F>
void launch_rows(const F& f, int64_t count, CUstream_st* stream);

}  // namespace moegraft::kernels::cuda
