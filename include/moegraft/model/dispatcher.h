#pragma once
// How tokens reach their experts and come back: the seam behind which expert parallelism lives. The decoder never asks
// where an expert is.

#include <torch/types.h>

#include <cstdint>
#include <memory>
#include <utility>

#include "moegraft/kernels/ops.h"

namespace moegraft::model {

class TokenDispatcher {
 public:
  virtual ~TokenDispatcher() = default;

  // The token rows whose experts this process holds, with their routing weights and the sort that brings them to their
  // experts.
  struct Routed {
    at::Tensor x_XD, weights_XK;
    kernels::Dispatch dispatch;
    std::shared_ptr<void> plan{};  // the dispatcher's own: how the rows go back
  };
  // The experts whose rows dispatch() brings here: first, count. dispatch.num_experts is count, and its expert 0 is
  // `first`.
  virtual std::pair<int64_t, int64_t> local_experts(int64_t num_experts) const { return {0, num_experts}; }
  // Whether dispatch() leaves every row where it is: nothing travels, and the host reads nothing from the device for
  // it.
  virtual bool is_local() const { return false; }
  // True when every process that must issue the same dispatches says true. Collective where there are several.
  virtual bool agree(bool mine) { return mine; }
  // topk_ids_TK int64 in [0, E), topk_weights_TK float32. Differentiable in x_TD and the weights.
  virtual Routed dispatch(const at::Tensor& x_TD, const at::Tensor& topk_ids_TK, const at::Tensor& topk_weights_TK,
                          int64_t num_experts, const at::Tensor& group_T, int64_t num_groups) = 0;

  // Weighted sums of the rows of dispatch() -> this process's tokens [T, D]. Differentiable.
  virtual at::Tensor combine(const at::Tensor& out_XD, const Routed& routed) = 0;
};

// Every expert is here: tokens stay where they are, kernels::moe_ffn gathers and sums.
class LocalDispatcher : public TokenDispatcher {
 public:
  bool is_local() const override { return true; }
  Routed dispatch(const at::Tensor& x_TD, const at::Tensor& topk_ids_TK, const at::Tensor& topk_weights_TK,
                  int64_t num_experts, const at::Tensor& group_T, int64_t num_groups) override {
    return {x_TD, topk_weights_TK, kernels::make_dispatch(topk_ids_TK, num_experts, group_T, num_groups)};
  }
  at::Tensor combine(const at::Tensor& out_XD, const Routed&) override { return out_XD; }
};

}  // namespace moegraft::model
