#pragma once
// Where every kernel starts. Through the runtime's function and not <<<>>>, so that a .cu file is plain C++ too: tests
// compile it against a stand-in for the runtime (tests/support/cuda_stand_in).

#include <c10/cuda/CUDAException.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace moegraft::kernels::cuda {

// blocks >= 1. Never waits; a launch that fails throws c10::Error.
template <class... Parameters, class... Arguments>
void start_kernel(void (*kernel)(Parameters...), int64_t blocks, int threads, CUstream_st* stream,
                  const Arguments&... arguments) {
  constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
  TORCH_CHECK(blocks <= kMaxBlocks, "a kernel of ", blocks, " blocks of ", threads,
              " threads is too large for one launch");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.stream = stream;
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace moegraft::kernels::cuda
