#pragma once
// The expert FFN behind its autograd function: one problem, several implementations (ATen everywhere, block products on
// the CPU, CUDA).

#include <algorithm>
#include <array>

#include "libtorch.h"
#include "moegraft/kernels/ops.h"

namespace moegraft::kernels {

enum { kGate = 0, kUp = 1, kDown = 2, kSites = 3 };

// Everything detached; x and weights (the rows' of terms too) contiguous, weights float32 (float64 beside float64 x).
struct MoeProblem {
  at::Tensor x_XD, weights_XK;
  Dispatch dispatch;
  ExpertFfnWeights weights;
  std::array<std::vector<ExpertLowRank>, kSites> terms;
  std::shared_ptr<FactorCache> cache = nullptr;  // for the forward pass alone

  int64_t model_width() const { return x_XD.size(1); }
  int64_t expert_width() const { return weights.expert_width(); }
};
inline bool has_row_weights(const MoeProblem& p) {
  return std::any_of(p.terms.begin(), p.terms.end(), [](const auto& site) {
    return std::any_of(site.begin(), site.end(), [](const ExpertLowRank& t) { return t.weight_X.defined(); });
  });
}
struct MoeForward {
  at::Tensor out_XD, hidden_RF;   // hidden only when asked for
  std::vector<at::Tensor> saved;  // what the same implementation's backward wants; empty when nothing is differentiated
};
// Undefined where not needed. Factor gradients have the factors' shapes and dtypes.
struct MoeGradients {
  at::Tensor x_XD, weights_XK, gate_EFD, up_EFD, down_EDF;
  std::array<std::vector<std::pair<at::Tensor, at::Tensor>>, kSites> factors;  // (A, B) of each term
  std::array<std::vector<at::Tensor>, kSites>
      row_weights;  // [X] of each term; empty where the implementation serves none
};
struct MoeNeeds {
  bool x = false, weights = false, experts = false;
  std::array<std::vector<bool>, kSites> factors;           // of each term
  std::array<std::vector<bool>, kSites> row_weights = {};  // of each term; empty: of none
  bool row_weight(int site, size_t term) const { return term < row_weights[site].size() && row_weights[site][term]; }
};

// Each slot's row, zeros where a slot has none. -> [X, K, D]; differentiable.
at::Tensor rows_of_slots(const at::Tensor& y_RD, const Dispatch& dispatch);
// Each row's value of a per-slot quantity. -> [R].
at::Tensor slots_to_rows(const at::Tensor& slots_XK, const Dispatch& dispatch);

MoeForward moe_forward_aten(const MoeProblem& problem, bool save, bool keep_hidden);
MoeGradients moe_backward_aten(const MoeProblem& problem, const std::vector<at::Tensor>& saved,
                               const at::Tensor& dout_XD, const MoeNeeds& needs);

// Frozen experts on a CPU with block products (float32, bfloat16).
bool moe_blocks_serve(const MoeProblem& problem);
MoeForward moe_forward_blocks(const MoeProblem& problem, bool save, bool keep_hidden);
MoeGradients moe_backward_blocks(const MoeProblem& problem, const std::vector<at::Tensor>& saved,
                                 const at::Tensor& dout_XD, const MoeNeeds& needs);

// Frozen experts on a GPU (cuda/). Never waits for the device.
bool moe_cuda_serves(const MoeProblem& problem);
bool moe_cuda_runs_on(int generation);  // compute capability, major
bool moe_cuda_fits(int64_t num_experts, int64_t model_width, int64_t expert_width);
MoeForward moe_forward_cuda(const MoeProblem& problem, bool save, bool keep_hidden);
MoeGradients moe_backward_cuda(const MoeProblem& problem, const std::vector<at::Tensor>& saved,
                               const at::Tensor& dout_XD, const MoeNeeds& needs);

}  // namespace moegraft::kernels
