#pragma once
// How evenly a run's steps are dealt to its processes, from lengths alone: nothing is computed.

#include "moegraft/data/stream.h"

namespace moegraft::data {

// Largest over mean of what ranks get, 1 when they get the same. over_steps is the sum of the steps' largest over the
// sum of their means: processes wait for the slowest in every step, so 1 - 1 / over_steps of their time is waiting.
struct Imbalance {
  double mean = 0, worst = 0, over_steps = 0;
};

struct Balance {
  int64_t steps = 0, tokens = 0, sequences = 0;
  double combinations_per_step = 0;             // of modalities: 1 when every rank's documents are of one kind
  int64_t smallest_step = 0, largest_step = 0;  // tokens
  int64_t empty_parts = 0;                      // micro-batches without a sequence
  Imbalance cost;                               // sequence_cost
  Imbalance new_tokens;  // of other modalities than text, in the steps that have any: rows that adapters and gradients
                         // work on
};

// The next `steps` steps of `stream`, dealt to share.world_size processes. The stream goes on by as many.
Balance measure_balance(BatchStream& stream, const Share& share, int64_t longest_allowed, int64_t steps);

}  // namespace moegraft::data
