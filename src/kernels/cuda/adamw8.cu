// The 8-bit AdamW step on CUDA: a warp per block of 256 values, eight values per lane, so the block's maxima need
// shuffles alone.

#include "start_kernel.cuh"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

#include "../adamw8.h"

namespace moegraft::kernels::adamw8 {
namespace {

constexpr int kWarp = 32, kThreads = 256, kWarps = kThreads / kWarp, kPerLane = kBlock / kWarp;

// Magnitudes compare as their bits; NaN is the largest, as on the CPU.
__device__ float largest_magnitude(const float (&x)[kPerLane]) {
  int largest = 0;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) largest = max(largest, __float_as_int(x[j]) & 0x7fffffff);
#pragma unroll
  for (int other = kWarp / 2; other > 0; other /= 2)
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, other));
  return __int_as_float(largest);
}

__global__ void __launch_bounds__(kThreads) step_kernel(Factors f, Arrays a, int64_t blocks) {
  __shared__ float with_sign[256], without_sign[256];
  static_assert(kThreads == 256, "each thread fills one entry of the maps");
  with_sign[threadIdx.x] = signed_value(int32_t(threadIdx.x));
  without_sign[threadIdx.x] = unsigned_value(int32_t(threadIdx.x));
  __syncthreads();

  const int lane = int(threadIdx.x) % kWarp;
  for (int64_t b = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; b < blocks; b += int64_t(gridDim.x) * kWarps) {
    const int64_t begin = b * kBlock + lane;
    float exp_avg[kPerLane], root[kPerLane];
    const float exp_avg_scale = a.exp_avg_scales[b], root_scale = a.root_scales[b];
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int64_t i = begin + j * kWarp;
      exp_avg[j] = root[j] = 0.0f;  // beyond the end: no part in the maxima
      if (i >= a.numel) continue;
      exp_avg[j] = with_sign[a.exp_avg_codes[i]] * exp_avg_scale;
      root[j] = without_sign[a.root_codes[i]] * root_scale;
      float parameter = a.parameter[i];
      update(f, a.grad[i], parameter, exp_avg[j], root[j]);
      a.parameter[i] = parameter;
    }
    const float new_exp_avg_scale = usable_scale(largest_magnitude(exp_avg)),
                new_root_scale = usable_scale(largest_magnitude(root));
    const float exp_avg_inverse = inverse_scale(new_exp_avg_scale), root_inverse = inverse_scale(new_root_scale);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int64_t i = begin + j * kWarp;
      if (i >= a.numel) continue;
      a.exp_avg_codes[i] = uint8_t(signed_code(exp_avg[j] * exp_avg_inverse));
      a.root_codes[i] = uint8_t(unsigned_code(root[j] * root_inverse));
    }
    __syncwarp();  // every lane has read the old scales
    if (lane == 0) {
      a.exp_avg_scales[b] = new_exp_avg_scale;
      a.root_scales[b] = new_root_scale;
    }
  }
}

}  // namespace

void step_cuda(const Factors& factors, const Arrays& arrays, int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  int processors = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int64_t blocks = (arrays.numel + kBlock - 1) / kBlock;
  const int64_t grid = std::min<int64_t>((blocks + kWarps - 1) / kWarps, int64_t(processors) * 8);
  cuda::start_kernel(&step_kernel, grid, kThreads, c10::cuda::getCurrentCUDAStream().stream(), factors, arrays, blocks);
}

}  // namespace moegraft::kernels::adamw8
