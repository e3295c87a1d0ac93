#pragma once
// Teams on the device, and the two launch shapes.

#include "start_kernel.cuh"

#include "launch.h"
#include "team.h"

namespace moegraft::kernels::cuda {
namespace device {

constexpr int kThreads = 256;
constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ __forceinline__ float exchange(float v, int offset) { return __shfl_xor_sync(kWholeWarp, v, offset); }
__device__ __forceinline__ Candidate exchange(const Candidate& v, int offset) {
  return {__shfl_xor_sync(kWholeWarp, v.value, offset), __shfl_xor_sync(kWholeWarp, v.index, offset)};
}
__device__ __forceinline__ SoftmaxSum exchange(const SoftmaxSum& v, int offset) {
  return {exchange(v.largest, offset), exchange(v.total, offset)};
}

// N lanes, all of which must call together. Larger teams than a warp are whole blocks and combine the warps' results in
// warp order.
template <int N>
struct Team : TeamBase<Team<N>> {
  static_assert(N % 32 == 0, "teams are whole warps");
  int lane = int(threadIdx.x) % N;

  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    f(lane);
  }
  template <class F, class Op>
  __device__ __forceinline__ auto reduce(const F& f, const Op& op) const {
    auto value = f(lane);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value = op(value, exchange(value, offset));
    if constexpr (N > 32) {
      __shared__ decltype(value) of_warp[N / 32];
      __syncthreads();  // an earlier reduction may still be read
      if (lane % 32 == 0) of_warp[lane / 32] = value;
      __syncthreads();
      value = of_warp[0];
#pragma unroll
      for (int warp = 1; warp < N / 32; ++warp) value = op(value, of_warp[warp]);
    }
    return value;
  }
};

template <class F>
__global__ void __launch_bounds__(kThreads) thread_kernel(const F f, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) f(i);
}

template <class F, int kBlock>
__global__ void __launch_bounds__(kBlock) row_kernel(const F f, int64_t count) {
  const int64_t row = int64_t(blockIdx.x) * (kBlock / F::kLanes) + threadIdx.x / F::kLanes;
  if (row < count) f(row, Team<F::kLanes>());  // the same for a whole team
}

}  // namespace device

template <class F>
void launch_threads(const F& f, int64_t count, CUstream_st* stream) {
  if (count <= 0) return;
  start_kernel(&device::thread_kernel<F>, (count + device::kThreads - 1) / device::kThreads, device::kThreads, stream,
               f, count);
}

template <class F>
void launch_rows(const F& f, int64_t count, CUstream_st* stream) {
  if (count <= 0) return;
  constexpr int kBlock = F::kLanes > 128 ? F::kLanes : 128;
  constexpr int64_t kPerBlock = kBlock / F::kLanes;
  start_kernel(&device::row_kernel<F, kBlock>, (count + kPerBlock - 1) / kPerBlock, kBlock, stream, f, count);
}

}  // namespace moegraft::kernels::cuda

#define MOEGRAFT_THREADS(...) template void launch_threads<__VA_ARGS__>(const __VA_ARGS__&, int64_t, CUstream_st*)
#define MOEGRAFT_ROWS(...) template void launch_rows<__VA_ARGS__>(const __VA_ARGS__&, int64_t, CUstream_st*)
