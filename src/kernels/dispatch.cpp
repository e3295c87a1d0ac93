// Local dispatch: which row of the experts' sorted rows each (token, slot) is.

#include "cuda/ops.h"
#include "implementations.h"
#include "libtorch.h"

#include <algorithm>
#include <type_traits>

#include "moegraft/base/check.h"
#include "moegraft/kernels/ops.h"

namespace moegraft::kernels {

std::vector<int64_t> Dispatch::host_offsets() const {
  const at::Tensor host = offsets.to(at::kCPU);
  const int32_t* data = host.const_data_ptr<int32_t>();
  return {data, data + host.numel()};
}

namespace {

struct DispatchCall {
  const at::Tensor& ids_TK;
  int64_t num_experts;
  const at::Tensor& group_T;
  int64_t num_groups, num_rows;
};

// A counting sort, stable in token order.
Dispatch sort_on_host(const DispatchCall& c) {
  const int64_t tokens = c.ids_TK.size(0), top_k = c.ids_TK.size(1), buckets = c.num_experts * c.num_groups;
  Dispatch d;
  d.num_experts = c.num_experts;
  d.num_groups = c.num_groups;
  d.top_k = top_k;
  const at::Tensor ids = c.ids_TK.to(at::kCPU).contiguous();
  const at::Tensor groups =
      c.group_T.defined() && c.num_groups > 1 ? c.group_T.to(at::kCPU, at::kLong).contiguous() : at::Tensor();
  const int64_t* id = ids.const_data_ptr<int64_t>();
  const int64_t* group = groups.defined() ? groups.const_data_ptr<int64_t>() : nullptr;
  const auto bucket = [&](int64_t t, int64_t k) { return id[t * top_k + k] * c.num_groups + (group ? group[t] : 0); };
  const at::TensorOptions int32(at::kInt);
  at::Tensor offsets = at::zeros({buckets + 1}, int32), token_of_row = at::empty({c.num_rows}, int32),
             row_of_slot = at::empty({tokens, top_k}, int32);
  int32_t *begin = offsets.data_ptr<int32_t>(), *token = token_of_row.data_ptr<int32_t>(),
          *row = row_of_slot.data_ptr<int32_t>();
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < top_k; ++k)
      if (id[t * top_k + k] >= 0) ++begin[bucket(t, k) + 1];
  for (int64_t b = 0; b < buckets; ++b) begin[b + 1] += begin[b];
  MOEGRAFT_INVARIANT(begin[buckets] == c.num_rows, "make_dispatch: ", begin[buckets],
                     " slots have an expert here, num_rows says ", c.num_rows);
  std::vector<int32_t> next(begin, begin + buckets);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < top_k; ++k) {
      const bool here = id[t * top_k + k] >= 0;
      const int32_t r = here ? next[bucket(t, k)]++ : -1;
      if (here) token[r] = int32_t(t);
      row[t * top_k + k] = r;
    }
  d.token_of_row_R = token_of_row.to(c.ids_TK.device());
  d.row_of_slot_TK = row_of_slot.to(c.ids_TK.device());
  d.offsets = offsets.to(c.ids_TK.device());
  return d;
}

struct DispatchImplementation {
  bool (*serves)(const DispatchCall&);
  Dispatch (*run)(const DispatchCall&);
};
constexpr DispatchImplementation kDispatch[]{
    {[](const DispatchCall& c) { return cuda::holds(c.ids_TK); },
     [](const DispatchCall& c) {
       return cuda::make_dispatch(c.ids_TK, c.num_experts, c.group_T, c.num_groups, c.num_rows);
     }},
    {kAlways, sort_on_host},
};

template <class scalar>
void sum_rows_on_cpu(const at::Tensor& rows_RN, const at::Tensor& row_of_TK, const at::Tensor& out_TN) {
  using wide = std::conditional_t<std::is_same_v<scalar, double>, double, float>;
  const int64_t N = out_TN.size(1), K = row_of_TK.size(1);
  const scalar* rows = rows_RN.const_data_ptr<scalar>();
  const int32_t* row_of = row_of_TK.const_data_ptr<int32_t>();
  scalar* out = out_TN.data_ptr<scalar>();
  at::parallel_for(0, out_TN.size(0), std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(N, 1)),
                   [&](int64_t begin, int64_t end) {
                     std::vector<wide> sum(static_cast<size_t>(N));
                     for (int64_t t = begin; t < end; ++t) {
                       std::fill(sum.begin(), sum.end(), wide(0));
                       for (int64_t k = 0; k < K; ++k) {
                         if (row_of[t * K + k] < 0) continue;
                         const scalar* from = rows + row_of[t * K + k] * N;
                         for (int64_t n = 0; n < N; ++n) sum[size_t(n)] += wide(from[n]);
                       }
                       for (int64_t n = 0; n < N; ++n) out[t * N + n] = scalar(sum[size_t(n)]);
                     }
                   });
}

at::Tensor sum_rows_cpu(const at::Tensor& rows_RN, const at::Tensor& row_of_TK) {
  MOEGRAFT_INVARIANT(rows_RN.is_cpu(), "sum_rows of ", c10::toString(rows_RN.scalar_type()), " on ", rows_RN.device());
  const at::Tensor out_TN = at::empty({row_of_TK.size(0), rows_RN.size(1)}, rows_RN.options());
  switch (rows_RN.scalar_type()) {
    case at::kFloat: sum_rows_on_cpu<float>(rows_RN, row_of_TK, out_TN); break;
    case at::kDouble: sum_rows_on_cpu<double>(rows_RN, row_of_TK, out_TN); break;
    case at::kBFloat16: sum_rows_on_cpu<at::BFloat16>(rows_RN, row_of_TK, out_TN); break;
    default:
      MOEGRAFT_INVARIANT(rows_RN.scalar_type() == at::kHalf, "sum_rows of ", c10::toString(rows_RN.scalar_type()));
      sum_rows_on_cpu<at::Half>(rows_RN, row_of_TK, out_TN);
  }
  return out_TN;
}

struct SumRowsImplementation {
  bool (*serves)(const at::Tensor& rows_RN);
  at::Tensor (*run)(const at::Tensor& rows_RN, const at::Tensor& row_of_TK);
};
constexpr SumRowsImplementation kSumRows[]{
    {cuda::serves,
     [](const at::Tensor& rows_RN, const at::Tensor& row_of_TK) { return cuda::combine(rows_RN, {}, row_of_TK); }},
    {kAlways, sum_rows_cpu},
};

}  // namespace

Dispatch make_dispatch(const at::Tensor& topk_ids_TK, int64_t num_experts, const at::Tensor& group_T,
                       int64_t num_groups, int64_t num_rows) {
  RECORD_FUNCTION("moegraft::make_dispatch", {});
  MOEGRAFT_INVARIANT(topk_ids_TK.dim() == 2 && topk_ids_TK.scalar_type() == at::kLong, "make_dispatch: ids ",
                     topk_ids_TK.sizes());
  const int64_t slots = topk_ids_TK.numel(), rows = num_rows < 0 ? slots : num_rows;
  MOEGRAFT_INVARIANT(slots < (int64_t{1} << 31) && rows <= slots, "make_dispatch: ", rows, " rows of ", slots,
                     " slots");
  const DispatchCall call{topk_ids_TK, num_experts, group_T, num_groups, rows};
  return choose(kDispatch, call).run(call);
}

at::Tensor sum_rows(const at::Tensor& rows_in, const at::Tensor& row_of_TK) {
  const at::Tensor rows_RN = rows_in.detach().contiguous();
  MOEGRAFT_INVARIANT(
      rows_RN.dim() == 2 && row_of_TK.dim() == 2 && row_of_TK.scalar_type() == at::kInt && row_of_TK.is_contiguous(),
      "sum_rows: rows ", rows_RN.sizes(), ", places ", row_of_TK.sizes());
  return choose(kSumRows, rows_RN).run(rows_RN, row_of_TK);
}

at::Tensor permute(const at::Tensor& x_TD, const Dispatch& dispatch) {
  return x_TD.detach().index_select(0, dispatch.token_of_row_R);
}

}  // namespace moegraft::kernels
