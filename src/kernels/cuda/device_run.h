#pragma once
// Runs functors on the current stream of the current device.

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include "launch.h"

namespace moegraft::kernels::cuda {

// Compute capability, major: 8 Ampere and Ada, 9 Hopper, 10 Blackwell.
inline int device_generation(int device) {
  int major = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major;
}

struct OnDevice {
  template <class F>
  static void threads(const F& f, int64_t count) {
    launch_threads(f, count, c10::cuda::getCurrentCUDAStream().stream());
  }
  template <class F>
  static void rows(const F& f, int64_t count) {
    launch_rows(f, count, c10::cuda::getCurrentCUDAStream().stream());
  }
};

}  // namespace moegraft::kernels::cuda
