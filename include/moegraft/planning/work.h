#pragma once
// The FLOPs and bytes that a training step needs, from shapes and a batch.

#include <cstdint>
#include <vector>

#include "moegraft/graft/grafted_model.h"
#include "moegraft/model/sites.h"

namespace moegraft::planning {

// Work that one step cannot do without, in FLOPs; recomputed work never counts. Attention scores stay apart: the usual
// count of 2 per active parameter leaves them out. memory_bytes: what must come from memory and go there where caches
// are small beside the model: each frozen weight that is met once forward and once backward; trained ones three times,
// their moments and gradients, and what is written of them. passes: batches like this one in the step.
struct StepWork {
  double forward = 0, activation_gradient = 0, lora = 0, attention_scores = 0, memory_bytes = 0;
  double total() const { return forward + activation_gradient + lora; }
};
// rank, sites: of the LoRA on it, 0 where there is none.
StepWork count_work(const graft::GraftedModel& m, const model::PackedBatch& batch, model::Gate gate, int64_t rank,
                    const std::vector<model::Site>& sites, int64_t passes = 1);

}  // namespace moegraft::planning
