#pragma once
// How tokens reach their experts and come back: the seam behind which expert parallelism lives. The decoder never asks where an expert is.

#include <torch/types.h>

#include "moegraft/kernels/ops.h"

namespace moegraft::model {

class TokenDispatcher {
 public:
  virtual ~TokenDispatcher() = default;

  // Rows for the experts that this process holds, sorted by (expert, group), and what combine() needs. Differentiable in x_TD.
  struct Routed {
    at::Tensor x_RD;
    kernels::Dispatch dispatch;
  };
  virtual Routed dispatch(const at::Tensor& x_TD, const at::Tensor& topk_ids_TK, int64_t num_experts, const at::Tensor& group_T, int64_t num_groups) = 0;

  // sum_k weight[t,k] * y[row(t,k)] for this process's tokens. Differentiable in y_RD and the weights.
  virtual at::Tensor combine(const at::Tensor& y_RD, const at::Tensor& topk_weights_TK, const Routed& routed) = 0;
};

// Every expert is here: a sort and gathers.
class LocalDispatcher : public TokenDispatcher {
 public:
  Routed dispatch(const at::Tensor& x_TD, const at::Tensor& topk_ids_TK, int64_t num_experts, const at::Tensor& group_T, int64_t num_groups) override {
    Routed r{{}, kernels::make_dispatch(topk_ids_TK, num_experts, group_T, num_groups)};
    r.x_RD = kernels::permute(x_TD, r.dispatch);
    return r;
  }
  at::Tensor combine(const at::Tensor& y_RD, const at::Tensor& topk_weights_TK, const Routed& routed) override { return kernels::combine(y_RD, topk_weights_TK, routed.dispatch); }
};

}  // namespace moegraft::model
