#pragma once
// Reading much of many files faster than one thread faults it in: threads read ahead into a few buffers, the caller
// uses one while the next fill.

#include <torch/types.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <vector>

namespace moegraft::io {

struct FileRange {
  std::filesystem::path file;
  int64_t offset = 0, bytes = 0;
};

// A stretch of a range that has been read: `bytes` is a view of a buffer, aligned for every dtype.
struct ReadPiece {
  size_t range = 0;
  int64_t begin = 0;  // within the range
  at::Tensor bytes;
};

struct ReadAheadOptions {
  int64_t threads = 8;                     // a cold NVMe drive wants several requests at a time
  int64_t piece_bytes = int64_t{8} << 20;  // of one request; a multiple of 64
};

// Reads all ranges, file by file from front to back. buffers: two or more contiguous uint8 tensors of one size (a
// multiple of 64). use() is called in the caller's thread with the pieces of one buffer after the other; when it
// returns, the buffer is filled anew. UserError: a file that cannot be read, or ends too early. What use() throws ends
// the reading too.
void read_ahead(const std::vector<FileRange>& ranges, const std::vector<at::Tensor>& buffers,
                const ReadAheadOptions& options, const std::function<void(const std::vector<ReadPiece>&)>& use);

}  // namespace moegraft::io
