// Local dispatch: which row of the experts' sorted rows each (token, slot) is.

#include "cuda/ops.h"
#include "libtorch.h"

#include "moegraft/base/check.h"
#include "moegraft/kernels/ops.h"

namespace moegraft::kernels {

std::vector<int64_t> Dispatch::host_offsets() const {
  const at::Tensor host = offsets.to(at::kCPU);
  const int32_t* data = host.const_data_ptr<int32_t>();
  return {data, data + host.numel()};
}

Dispatch make_dispatch(const at::Tensor& topk_ids_TK, int64_t num_experts, const at::Tensor& group_T, int64_t num_groups, int64_t num_rows) {
  RECORD_FUNCTION("moegraft::make_dispatch", {});
  MOEGRAFT_INVARIANT(topk_ids_TK.dim() == 2 && topk_ids_TK.scalar_type() == at::kLong, "make_dispatch: ids ", topk_ids_TK.sizes());
  const int64_t tokens = topk_ids_TK.size(0), top_k = topk_ids_TK.size(1), rows = num_rows < 0 ? tokens * top_k : num_rows, buckets = num_experts * num_groups;
  MOEGRAFT_INVARIANT(tokens * top_k < (int64_t{1} << 31) && rows <= tokens * top_k, "make_dispatch: ", rows, " rows of ", tokens * top_k, " slots");
  if (cuda::holds(topk_ids_TK)) return cuda::make_dispatch(topk_ids_TK, num_experts, group_T, num_groups, rows);
  Dispatch d;
  d.num_experts = num_experts;
  d.num_groups = num_groups;
  d.top_k = top_k;
  // A counting sort, stable in token order.
  const at::Tensor ids = topk_ids_TK.to(at::kCPU).contiguous();
  const at::Tensor groups = group_T.defined() && num_groups > 1 ? group_T.to(at::kCPU, at::kLong).contiguous() : at::Tensor();
  const int64_t* id = ids.const_data_ptr<int64_t>();
  const int64_t* group = groups.defined() ? groups.const_data_ptr<int64_t>() : nullptr;
  const auto bucket = [&](int64_t t, int64_t k) { return id[t * top_k + k] * num_groups + (group ? group[t] : 0); };
  const at::TensorOptions int32(at::kInt);
  at::Tensor offsets = at::zeros({buckets + 1}, int32), token_of_row = at::empty({rows}, int32), row_of_slot = at::empty({tokens, top_k}, int32);
  int32_t *begin = offsets.data_ptr<int32_t>(), *token = token_of_row.data_ptr<int32_t>(), *row = row_of_slot.data_ptr<int32_t>();
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < top_k; ++k)
      if (id[t * top_k + k] >= 0) ++begin[bucket(t, k) + 1];
  for (int64_t b = 0; b < buckets; ++b) begin[b + 1] += begin[b];
  MOEGRAFT_INVARIANT(begin[buckets] == rows, "make_dispatch: ", begin[buckets], " slots have an expert here, num_rows says ", rows);
  std::vector<int32_t> next(begin, begin + buckets);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < top_k; ++k) {
      const bool here = id[t * top_k + k] >= 0;
      const int32_t r = here ? next[bucket(t, k)]++ : -1;
      if (here) token[r] = int32_t(t);
      row[t * top_k + k] = r;
    }
  d.token_of_row_R = token_of_row.to(topk_ids_TK.device());
  d.row_of_slot_TK = row_of_slot.to(topk_ids_TK.device());
  d.offsets = offsets.to(topk_ids_TK.device());
  return d;
}

at::Tensor permute(const at::Tensor& x_TD, const Dispatch& dispatch) { return x_TD.detach().index_select(0, dispatch.token_of_row_R); }

}  // namespace moegraft::kernels
