#pragma once
// Page-locked memory for much data: chunks of one size that requests run through.

#include <torch/types.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace moegraft::model {

// LibTorch's host allocator rounds every request up to a power of two (CachingHostAllocator.h): 1.2 GB of experts a
// layer would lock 2 GiB. Chunks that are a power of two themselves lose nothing but the rest of the last one, and a
// freed chunk is what the next arena asks for.
constexpr int64_t kChunkBytes = int64_t{256} << 20;

class HostArena {
 public:
  // bytes -> a uint8 tensor [bytes] in host memory.
  using Source = std::function<at::Tensor(int64_t bytes)>;
  static at::Tensor page_locked(int64_t bytes);  // needs a CUDA device

  // chunk_bytes: a power of two, at least 16.
  explicit HostArena(Source source = page_locked, int64_t chunk_bytes = kChunkBytes);

  // The next numel elements, as tensors that follow each other: one, and one more for each border of a chunk they
  // cross. Memory is got a chunk at a time. All requests of an arena have elements of one size (InvariantError).
  std::vector<at::Tensor> take(int64_t numel, at::ScalarType dtype);

  int64_t bytes_taken() const { return taken_; }
  int64_t bytes_locked() const { return int64_t(chunks_.size()) * chunk_bytes_; }

 private:
  Source source_;
  int64_t chunk_bytes_, taken_ = 0;
  std::vector<at::Tensor> chunks_;
};

// Copies tensors laid end to end into others laid end to end: the same number of elements, cut anywhere
// (InvariantError).
void copy_end_to_end(const std::vector<at::Tensor>& from, const std::vector<at::Tensor>& to, bool non_blocking = false);

}  // namespace moegraft::model
