#include "gpu_memory.h"

#include <algorithm>

#include "moegraft/planning/memory.h"

namespace moegraft::planning::gpu {

int64_t collectives(const MemoryRequest& r) {
  if (r.expert_size * r.data_size == 1) return 0;
  const bool copies = r.data_size > 1;
  int64_t groups = 2;                            // the world's own (statistics, updates) and its gradients
  if (copies && r.expert_size > 1) groups += 1;  // gradients of experts
  if (copies && r.shard_base) groups += 1;       // their weights
  if (copies && r.shard_optimizer) groups += 1;  // their updates
  return groups * kNcclGroup + std::min(r.expert_size - 1, kNcclPeers) * kNcclPeer;
}

int64_t flash_backward(int64_t tokens, int64_t sequences, int64_t heads, int64_t kv_heads, int64_t head_dim,
                       int64_t width) {
  const int64_t padded = head_dim > 192 ? 256 : (head_dim + 31) / 32 * 32, rows = tokens + 128 * sequences;
  const int64_t splits = (kMultiprocessors + sequences * heads - 1) / (sequences * heads);
  return splits * rows * heads * padded * 4 + heads * rows * 4 +
         (kv_heads < heads ? 2 * tokens * heads * head_dim * width : 0);
}

}  // namespace moegraft::planning::gpu
