#pragma once
// The decoder's fused operations. All are differentiable and run on the device of their inputs; results do not depend on thread timing.
// Letters as in model/spec.h; R routed rows = T*K, X any number of rows.

#include <torch/types.h>

#include <vector>

namespace moegraft::kernels {

// y = w * x / sqrt(mean(x^2) + eps) over the last dimension; statistics in float32, result in x's dtype. w may require grad.
at::Tensor rms_norm(const at::Tensor& x_XD, const at::Tensor& weight_D, double eps);

// Rotates the two halves of each head: (a, b) -> (a cos - b sin, b cos + a sin) (the "rotate_half" convention). cos, sin float32 [T, C/2].
at::Tensor rotary(const at::Tensor& x_THC, const at::Tensor& cos_TC, const at::Tensor& sin_TC);

// Causal attention inside each packed sequence, grouped queries (H % G == 0). window > 0: only keys j with i - window < j <= i.
at::Tensor packed_attention(const at::Tensor& q_THC, const at::Tensor& k_TGC, const at::Tensor& v_TGC, const std::vector<int64_t>& cu_seqlens, int64_t window,
                            double scale);

// Inference with a cache: sequence i's queries are the last of its kv_lengths[i] cached positions. keys, values [B, S_max, G, C].
at::Tensor cached_attention(const at::Tensor& q_THC, const at::Tensor& keys_BSGC, const at::Tensor& values_BSGC, const std::vector<int64_t>& cu_seqlens,
                            const std::vector<int64_t>& kv_lengths, int64_t window, double scale);

// Rows of the experts, sorted by (expert, group), stable in token order. group_T: values in [0, num_groups), undefined for one group.
struct Dispatch {
  int64_t num_experts = 0, num_groups = 1, top_k = 0;
  at::Tensor token_of_row_R;         // int64
  at::Tensor row_of_slot_TK;         // int64, inverse: slot (t, k) lies in this row
  std::vector<int64_t> offsets;      // [E*num_groups + 1], begin of (e, g) at offsets[e*num_groups + g]
};
Dispatch make_dispatch(const at::Tensor& topk_ids_TK, int64_t num_experts, const at::Tensor& group_T, int64_t num_groups);
at::Tensor permute(const at::Tensor& x_TD, const Dispatch& dispatch);                                            // -> [R, D]
at::Tensor combine(const at::Tensor& y_RD, const at::Tensor& topk_weights_TK, const Dispatch& dispatch);         // sum_k w[t,k] * y[row(t,k)], in y's dtype

// One low-rank term on an expert site: y += scale * (x A_e^T) B_e^T on rows whose group has acts[group].
struct ExpertLowRank {
  at::Tensor A_EPX, B_EXP;  // float32 (masters) or the compute dtype
  double scale = 1.0;
  std::vector<bool> acts;   // [num_groups]
};
// Frozen experts: one [F,D] / [D,F] matrix each. Trained ones: stacked leaves, whose gradients are then filled.
struct ExpertFfnWeights {
  std::vector<at::Tensor> gate_FD, up_FD, down_DF;
  at::Tensor gate_EFD, up_EFD, down_EDF;
};
struct ExpertFfnAdapters {
  std::vector<ExpertLowRank> gate, up, down;
  bool empty() const { return gate.empty() && up.empty() && down.empty(); }
};
// SwiGLU experts on sorted rows: down(silu(gate x) * up x). Never builds a full weight update; no gradients for frozen weights;
// an expert without rows costs nothing and gets exactly zero gradients for its factors. hidden_RF, when given, receives silu(gate)*up (calibration).
at::Tensor expert_ffn(const at::Tensor& x_RD, const Dispatch& dispatch, const ExpertFfnWeights& weights, const ExpertFfnAdapters& adapters,
                      at::Tensor* hidden_RF = nullptr);
// The same, written plainly with autograd: what the fused one is tested against.
at::Tensor expert_ffn_reference(const at::Tensor& x_RD, const Dispatch& dispatch, const ExpertFfnWeights& weights, const ExpertFfnAdapters& adapters);

// Sum over rows of scale * (logsumexp(h W^T) - (h W^T)[target]); gradients for h, and for W when it requires grad. Chunked: the [X, V] logits are never
// held whole. W may be a float32 master under a lower compute dtype. Returns a float32 scalar.
at::Tensor linear_cross_entropy(const at::Tensor& h_XD, const at::Tensor& weight_VD, const at::Tensor& targets_X, double scale);

}  // namespace moegraft::kernels
