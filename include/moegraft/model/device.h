#pragma once
#include <optional>

#include "moegraft/model/batch.h"

namespace moegraft::model {

// Copies a batch and its facts to `device`; the batch itself when it is there already. From page-locked memory (pin) to
// a GPU the copy is only enqueued on the current stream, and the host goes on.
PackedBatch to_device(const PackedBatch& batch, at::Device device);
SplitBatch to_device(const SplitBatch& split, at::Device device);

// The same batch in page-locked memory (needs a CUDA device). Plain copies, in the calling thread.
PackedBatch pin(const PackedBatch& batch);

// Bytes that an accelerator has free, its libraries' and other processes' memory taken off (for CUDA cudaMemGetInfo's).
// None for the CPU, and where there is no such device.
std::optional<int64_t> free_memory(at::Device device);

}  // namespace moegraft::model
