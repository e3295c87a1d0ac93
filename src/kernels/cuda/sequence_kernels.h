#pragma once
// What a kernel over ragged sequences wants to know of them, from cumulative lengths.

#include "team.h"

namespace moegraft::kernels::cuda {

// One thread per sequence of a bucket, and one more: lengths [bucket], 0 beyond the sequences there are; where each
// begins, in elements of a packed tensor with so many of them per token [bucket + 1]. cu_q and cu_kv: [sequences + 1].
struct SequenceOffsets {
  const int32_t *cu_q, *cu_kv;
  int64_t sequences, bucket;
  int32_t q_width, kv_width, stats_width;  // elements of a token: heads * head_dim, groups * head_dim, heads
  int32_t *lengths_q, *lengths_kv, *begin_q, *begin_kv, *begin_stats;

  MOEGRAFT_HD void operator()(int64_t i) const {
    const int64_t here = i < sequences ? i : sequences, next = i + 1 < sequences ? i + 1 : sequences;
    begin_q[i] = cu_q[here] * q_width;
    begin_kv[i] = cu_kv[here] * kv_width;
    begin_stats[i] = cu_q[here] * stats_width;
    if (i == bucket) return;
    lengths_q[i] = cu_q[next] - cu_q[here];
    lengths_kv[i] = cu_kv[next] - cu_kv[here];
  }
};

}  // namespace moegraft::kernels::cuda
