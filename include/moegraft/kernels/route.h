#pragma once
// The router's step after its product: probabilities over the experts, the chosen ones and their weights.

#include <torch/types.h>

namespace moegraft::kernels {

struct Route {
  at::Tensor probs_TE, topk_ids_TK, topk_weights_TK;  // probabilities and weights are differentiable; ids int64, in falling order
};
// logits float32 (float64 for tests) [T, E]; top_k in [1, E]. Weights are the probabilities of the chosen, divided by their sum when `renormalise`.
// Of equal probabilities the lower index comes first (in float64 ATen chooses).
Route route(const at::Tensor& logits_TE, int64_t top_k, bool renormalise);

}  // namespace moegraft::kernels
