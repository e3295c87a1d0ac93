#pragma once
// A CPU stand-in for what the device code of src/kernels uses of the CUDA runtime: with this folder first on the
// include path a .cu file is plain C++.
//
// Each CUDA thread is a thread of the system, and barriers and shuffles really wait for each other, so that
// ThreadSanitizer reports a barrier that is missing. A thread that has left its kernel takes part in no later barrier,
// as on a device. Blocks run one after the other, the last one first, since nothing may depend on their order; what two
// blocks do to one address at once is therefore not seen. Shared memory is a static variable: it keeps what an earlier
// block left there, as it may on a device.

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>

#define __CUDA_ARCH__ 900  // after c10's headers, which would take it as leave to use nvcc's own types
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline constinit thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace cuda_stand_in {

constexpr unsigned kWarp = 32;

// std::barrier yields many times before it sleeps, which costs most of the time where threads are many and processors
// few.
class Barrier {
 public:
  explicit Barrier(unsigned threads) : expected_(threads) {}
  void wait() {
    std::unique_lock lock(mutex_);
    const unsigned phase = phase_;
    if (++arrived_ == expected_)
      open();
    else
      opened_.wait(lock, [&] { return phase_ != phase; });
  }
  void leave() {
    const std::lock_guard lock(mutex_);
    if (--expected_ == arrived_ && arrived_ > 0) open();
  }

 private:
  void open() {
    arrived_ = 0;
    ++phase_;
    opened_.notify_all();
  }
  std::mutex mutex_;
  std::condition_variable opened_;
  unsigned expected_, arrived_ = 0, phase_ = 0;
};

struct Warp {
  Barrier barrier{kWarp};
  uint32_t of_lane[2][kWarp] = {};
};
struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  explicit Block(unsigned threads) : barrier(threads), warps(threads / kWarp) {}
};
inline constinit thread_local Block* block = nullptr;
inline constinit thread_local unsigned shuffles = 0;  // of this thread in this block
inline Warp& warp() { return block->warps[threadIdx.x / kWarp]; }

// The threads of blocks of one size, kept from launch to launch: starting them takes longer than most kernels. Each
// goes through all blocks of a grid, which it enters and leaves together with the others.
class Threads {
 public:
  explicit Threads(unsigned count) : count_(count), start_(count + 1), end_(count + 1), entry_(count), exit_(count) {
    for (unsigned t = 0; t < count; ++t) all_.emplace_back([this, t] { live(t); });
  }
  ~Threads() {
    kernel_ = nullptr;
    start_.wait();
    for (auto& thread : all_) thread.join();
  }
  void run(unsigned blocks, const std::function<void()>& kernel) {
    blocks_ = blocks, kernel_ = &kernel;
    start_.wait();
    end_.wait();
  }

 private:
  void live(unsigned t) {
    for (;;) {
      start_.wait();
      if (!kernel_) return;
      threadIdx = dim3(t, 0, 0), blockDim = dim3(count_), gridDim = dim3(blocks_);
      for (unsigned b = blocks_; b-- > 0;) {
        if (t == 0) current_ = std::make_unique<Block>(count_);
        entry_.wait();
        blockIdx = dim3(b, 0, 0), block = current_.get(), shuffles = 0;
        (*kernel_)();
        warp().barrier.leave();
        block->barrier.leave();
        exit_.wait();
      }
      end_.wait();
    }
  }

  const unsigned count_;
  unsigned blocks_ = 0;
  const std::function<void()>* kernel_ = nullptr;
  std::unique_ptr<Block> current_;
  Barrier start_, end_, entry_, exit_;  // a launch, with its caller; a block
  std::vector<std::thread> all_;
};
inline void run_grid(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  static std::map<unsigned, Threads> of_size;
  of_size.try_emplace(threads, threads).first->second.run(blocks, kernel);
}

}  // namespace cuda_stand_in

// ------------------------------------------------------------------------------------------------ in kernels

inline void __syncthreads() { cuda_stand_in::block->barrier.wait(); }
inline void __syncwarp() { cuda_stand_in::warp().barrier.wait(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  TORCH_CHECK(mask == 0xffffffffu, "the stand-in shuffles whole warps");
  uint32_t* of_lane =
      cuda_stand_in::warp().of_lane[cuda_stand_in::shuffles++ % 2];  // of two, since the one before may still be read
  const unsigned lane = threadIdx.x % cuda_stand_in::kWarp;
  std::memcpy(of_lane + lane, &value, sizeof value);
  __syncwarp();
  std::memcpy(&value, of_lane + (lane ^ unsigned(lane_mask)), sizeof value);
  return value;
}

inline int atomicAdd(int* to, int value) { return __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
// A device traps on an address off 16 bytes.
template <class Vector>
void __stwb(Vector* to, Vector value) {
  TORCH_CHECK(reinterpret_cast<uintptr_t>(to) % sizeof(Vector) == 0, "a store of ", sizeof(Vector),
              " bytes off its alignment");
  std::memcpy(to, &value, sizeof value);
}

inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
using std::max;

// ------------------------------------------------------------------------------------------------ on the host

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1;  // small grids, so that kernels have to stride over their blocks
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
// Returns when the kernel is through. Limits as on a device; blocks are whole warps.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  TORCH_CHECK(grid.y == 1 && grid.z == 1 && block.y == 1 && block.z == 1 && block.x % cuda_stand_in::kWarp == 0 &&
                  config->dynamicSmemBytes == 0,
              "the stand-in has no such launch");
  if (grid.x < 1 || grid.x > 0x7fffffffu || block.x < 1 || block.x > 1024) return cudaErrorInvalidConfiguration;
  cuda_stand_in::run_grid(grid.x, block.x, [&] { kernel(arguments...); });
  return cudaSuccess;
}
