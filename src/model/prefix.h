#pragma once
// Batches cut at each sequence's first token that is not text.

#include <functional>

#include "layers.h"

namespace moegraft::model {

struct SplitBatch {
  PackedBatch prefix, rest;              // with facts; as many sequences as the batch, some of them empty
  at::Tensor prefix_tokens, rest_tokens; // int64: where their tokens lie in the batch
};
SplitBatch split_prefix(const PackedBatch& batch, const std::vector<int64_t>& id_bounds);

// A second, small pass through the layers costs reading their weights again: few prefix tokens are not worth it. Depends on the batch alone.
bool prefix_is_worth_it(const BatchFacts& facts, int64_t num_tokens);

// The same result for a whole prefix pass: of captions (prefixes that something follows) through the cache, of sequences that are text alone in a pass of
// their own, which gives no keys. `run` is Decoder::run without recorded gradients; with `keep` it leaves keys and values there.
// Captions that are not in the cache are computed each as if alone: in one pass where the machine gives them the same bits, one by one elsewhere. The
// routing observer is told of a caption from what was kept, whether it was here or has just been computed.
struct PrefixPass {
  at::Tensor hidden_TD;
  std::shared_ptr<const PastKeys> past;
};
using RunPrefix = std::function<at::Tensor(const PackedBatch& batch, const ForwardOptions& options, std::shared_ptr<PastKeys> keep)>;
PrefixPass cached_prefix(PrefixCache& cache, const DecoderSpec& spec, WeightProvider& weights, const SplitBatch& split, const ForwardOptions& options, const RunPrefix& run);

}  // namespace moegraft::model
