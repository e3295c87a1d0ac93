#pragma once
// See cuda_runtime.h.

#include <c10/util/Exception.h>
#include <cuda_runtime.h>

#define C10_CUDA_CHECK(EXPR)                                                   \
  do {                                                                         \
    const cudaError_t error = (EXPR);                                          \
    TORCH_CHECK(error == cudaSuccess, "CUDA error ", static_cast<int>(error)); \
  } while (0)
