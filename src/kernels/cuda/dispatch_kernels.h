#pragma once
// A stable counting sort of slots (t, k) by bucket (expert, group): counts per (bucket, chunk of slots), a scan, and
// the place of each slot. Sums of integers only, so the result does not depend on the order in which threads run.

#include "team.h"

namespace moegraft::kernels::cuda {

constexpr int64_t kSortChunk = 256;  // slots; a slot's rank inside its chunk is counted directly

// One thread per slot. counts [buckets + 1, chunks], zero before: slots without an expert here (id < 0) share the last
// bucket. An id beyond the experts would write elsewhere: it is brought back into range.
struct CountSlots {
  const int64_t* ids;
  const int64_t* group;  // null: one group
  int64_t top_k, num_experts, num_groups, chunks;
  int32_t *bucket_of_slot, *counts;

  MOEGRAFT_HD void operator()(int64_t i) const {
    int64_t e = ids[i], g = group ? group[i / top_k] : 0;
    const bool here = e >= 0;
    e = e >= num_experts ? num_experts - 1 : e;
    g = g < 0 ? 0 : g >= num_groups ? num_groups - 1 : g;
    const int64_t bucket = (here ? e * num_groups + g : num_experts * num_groups);
    bucket_of_slot[i] = int32_t(bucket);
    count_one(counts + bucket * chunks + i / kSortChunk);
  }
};

// One thread per slot. ends: the inclusive scan of counts in (bucket, chunk) order. buckets: of experts.
struct PlaceSlots {
  const int32_t *bucket_of_slot, *counts, *ends;
  int64_t top_k, chunks, buckets;
  int32_t *token_of_row, *row_of_slot;

  MOEGRAFT_HD void operator()(int64_t i) const {
    const int32_t bucket = bucket_of_slot[i];
    if (bucket == buckets) {
      row_of_slot[i] = -1;
      return;
    }
    const int64_t chunk = i / kSortChunk, cell = bucket * chunks + chunk;
    int32_t row = ends[cell] - counts[cell];
    for (int64_t j = chunk * kSortChunk; j < i; ++j) row += bucket_of_slot[j] == bucket;
    token_of_row[row] = int32_t(i / top_k);
    row_of_slot[i] = row;
  }
};

// One thread per entry of offsets [buckets + 1].
struct BucketOffsets {
  const int32_t* ends;
  int64_t chunks;
  int32_t* offsets;

  MOEGRAFT_HD void operator()(int64_t bucket) const { offsets[bucket] = bucket == 0 ? 0 : ends[bucket * chunks - 1]; }
};

}  // namespace moegraft::kernels::cuda
