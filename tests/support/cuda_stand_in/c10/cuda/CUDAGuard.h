#pragma once
// See cuda_runtime.h.

#include <c10/core/Device.h>

namespace c10::cuda {

struct CUDAGuard {
  explicit CUDAGuard(DeviceIndex) {}
};

}  // namespace c10::cuda
