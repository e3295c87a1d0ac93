#pragma once
// The pass over text that stands before other modalities, from what is known of captions.

#include <functional>

#include "layers.h"

namespace moegraft::model {

// The same result for a whole prefix pass: of captions (prefixes that something follows) through the cache, of
// sequences that are text alone in a pass of their own, which gives no keys. `run` is Decoder::run without recorded
// gradients; with `keep` it leaves keys and values there. Captions that are not in the cache are computed each as if
// alone: in one pass where the machine gives them the same bits, one by one elsewhere. The routing observer is told of
// a caption from what was kept, whether it was here or has just been computed.
struct PrefixPass {
  at::Tensor hidden_TD;
  std::shared_ptr<const PastKeys> past;
};
using RunPrefix =
    std::function<at::Tensor(const PackedBatch& batch, const ForwardOptions& options, std::shared_ptr<PastKeys> keep)>;
PrefixPass cached_prefix(PrefixCache& cache, const DecoderSpec& spec, WeightProvider& weights, const SplitBatch& split,
                         const ForwardOptions& options, const RunPrefix& run);

}  // namespace moegraft::model
