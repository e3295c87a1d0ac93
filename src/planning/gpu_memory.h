#pragma once
// Memory of a GPU beside the tensors of model/ and kernels/: the driver's, the libraries' and the collectives'. From
// sources that each line names; nothing here has been measured on a card yet.

#include <cstdint>

namespace moegraft::planning {

struct MemoryRequest;

namespace gpu {

// What a plan may take of what a card has free. The rest is the allocator's: it rounds tensors above 1 MiB up to 2 MiB
// and keeps holes between live ones (c10/core/AllocatorConfig.h).
constexpr double kShareOfFree = 0.94;

// Estimate: 426 MiB are reported for the bare context under PyTorch 2.10 and CUDA 13 (unslothai/unsloth-zoo#1053);
// modules come when their kernels are first called (pytorch#107667), and cuBLAS takes 32 MiB of work space on Hopper.
constexpr int64_t kContext = int64_t{600} << 20;

// Estimates from a report on 8 H100 (NVIDIA/nccl#1685): 1.06 GB before the first all-to-all, the context among
// them, 4.34 GB after it, for 7 peers. Each communicator has its own buffers, and they stop growing beyond one
// machine's peers (NVIDIA/nccl#986).
constexpr int64_t kNcclGroup = int64_t{512} << 20, kNcclPeer = int64_t{448} << 20, kNcclPeers = 7;
// Of every group that CUDA tensors pass through.
int64_t collectives(const MemoryRequest& request);

// Temporaries of LibTorch's deterministic flash backward (FlashAttention 2, mha_varlen_bwd): dq in float32 once for
// each split of the keys, as many splits as fill the card with (sequence, head) pairs; 128 rows to spare a sequence;
// one float a (head, row); dk and dv of every query head where heads share keys. Heads are padded to 32 columns, above
// 192 to 256. Most where sequences are fewest. Of a card with 132 multiprocessors (H100, H200).
constexpr int64_t kMultiprocessors = 132;
int64_t flash_backward(int64_t tokens, int64_t sequences, int64_t heads, int64_t kv_heads, int64_t head_dim,
                       int64_t width);

}  // namespace gpu
}  // namespace moegraft::planning
