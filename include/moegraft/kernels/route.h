#pragma once
// The router's step after its product: probabilities over the experts, the chosen ones and their weights.

#include <torch/types.h>

namespace moegraft::kernels {

struct Route {
  at::Tensor probs_TE, topk_ids_TK,
      topk_weights_TK;  // probabilities and weights are differentiable; ids int64, in falling order
};
// logits float32 (float64 for tests) [T, E]; top_k in [1, E]. Weights are the probabilities of the chosen, divided by
// their sum when `renormalise`. Of equal probabilities the lower index comes first (in float64 ATen chooses).
Route route(const at::Tensor& logits_TE, int64_t top_k, bool renormalise);

// Other ways from scores to a choice (model::RouterSpec says which models have them).
struct RouteRule {
  bool sigmoid = false;                     // scores by each expert's sigmoid instead of a softmax over all
  at::Tensor correction_E;                  // float32, added to the scores for the choice alone; undefined: nothing
  int64_t num_groups = 1, topk_groups = 1;  // equal groups of experts; only those of the topk_groups with the largest
                                            // sums of their two best may be chosen
  bool renormalise = false;
  double scale = 1.0;  // of the weights, at last
};
// Probabilities are the scores divided by their sum; ids come in falling order of score. Composed of ATen's operations,
// but for a softmax's plain top k, which is route() above.
Route route(const at::Tensor& logits_TE, int64_t top_k, const RouteRule& rule);

// Adds one such result's sums by modality to sums_MX, float64 [M, 2E + 3]: selections and probability mass of each
// expert, tokens, entropies of their probabilities over ln E (1: uniform), and largest minus second largest
// probability. ids in falling order of probability; modality_T int64 in [0, M), undefined: all 0. No gradient, no host
// synchronisation. Equal calls give equal bits: no scattered adds.
void add_routing_sums(const at::Tensor& sums_MX, const at::Tensor& probs_TE, const at::Tensor& topk_ids_TK,
                      const at::Tensor& modality_T);

}  // namespace moegraft::kernels
