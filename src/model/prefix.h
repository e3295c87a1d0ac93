#pragma once
// Batches cut at each sequence's first token that is not text.

#include "moegraft/model/batch.h"

namespace moegraft::model {

struct SplitBatch {
  PackedBatch prefix, rest;              // with facts; as many sequences as the batch, some of them empty
  at::Tensor prefix_tokens, rest_tokens; // int64: where their tokens lie in the batch
};
SplitBatch split_prefix(const PackedBatch& batch, const std::vector<int64_t>& id_bounds);

// A second, small pass through the layers costs reading their weights again: few prefix tokens are not worth it. Depends on the batch alone.
bool prefix_is_worth_it(const BatchFacts& facts, int64_t num_tokens);

}  // namespace moegraft::model
