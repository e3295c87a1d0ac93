// Local dispatch: rows of the experts sorted by (expert, group), and the weighted sum back. Gathers only, so the order of sums is fixed.

#include "cpu.h"
#include "moegraft/base/check.h"
#include "moegraft/kernels/ops.h"

namespace moegraft::kernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kTokenGrain = 16;

at::Tensor gather_and_sum(const at::Tensor& y_RD, const at::Tensor& row_of_slot_TK) {
  const int64_t tokens = row_of_slot_TK.size(0), top_k = row_of_slot_TK.size(1);
  return y_RD.index_select(0, row_of_slot_TK.view({-1})).view({tokens, top_k, y_RD.size(1)}).sum(1);
}

class Permute : public torch::autograd::Function<Permute> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& token_of_row, const at::Tensor& row_of_slot) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({row_of_slot});
    return x.index_select(0, token_of_row);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return {gather_and_sum(grads[0].contiguous(), ctx->get_saved_variables()[0]), at::Tensor(), at::Tensor()};
  }
};

template <class scalar_t>
void combine_forward_cpu(const scalar_t* y, const float* w, const int64_t* rows, scalar_t* out, int64_t tokens, int64_t top_k, int64_t width) {
  at::parallel_for(0, tokens, kTokenGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(width);
    for (int64_t t = begin; t < end; ++t) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t k = 0; k < top_k; ++k) {
        const float weight = w[t * top_k + k];
        const scalar_t* row = y + rows[t * top_k + k] * width;
        for (int64_t i = 0; i < width; ++i) sum[i] += weight * float(row[i]);
      }
      for (int64_t i = 0; i < width; ++i) out[t * width + i] = scalar_t(sum[i]);
    }
  });
}

template <class scalar_t>
void combine_backward_cpu(const scalar_t* dout, const scalar_t* y, const float* w, const int64_t* rows, scalar_t* dy, float* dw, int64_t tokens, int64_t top_k, int64_t width) {
  at::parallel_for(0, tokens, kTokenGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const scalar_t* d = dout + t * width;
      for (int64_t k = 0; k < top_k; ++k) {
        const int64_t r = rows[t * top_k + k];
        const float weight = w[t * top_k + k];
        const scalar_t* yr = y + r * width;
        scalar_t* dyr = dy + r * width;
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < width; ++i) dot += float(d[i]) * float(yr[i]);
        for (int64_t i = 0; i < width; ++i) dyr[i] = scalar_t(weight * float(d[i]));
        dw[t * top_k + k] = dot;
      }
    }
  });
}

class Combine : public torch::autograd::Function<Combine> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& y, const at::Tensor& weights, const at::Tensor& token_of_row, const at::Tensor& row_of_slot) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({y, weights, token_of_row, row_of_slot});
    const int64_t tokens = row_of_slot.size(0), top_k = row_of_slot.size(1), width = y.size(1);
    if (!has_cpu_path(y)) {
      const auto wide = y.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
      const at::Tensor picked = y.index_select(0, row_of_slot.view({-1})).view({tokens, top_k, width}).to(wide);
      return (picked * weights.to(wide).unsqueeze(-1)).sum(1).to(y.scalar_type());
    }
    const at::Tensor w = weights.to(at::kFloat).contiguous();
    at::Tensor out = at::empty({tokens, width}, y.options());
    if (y.scalar_type() == at::kFloat) combine_forward_cpu(y.const_data_ptr<float>(), w.const_data_ptr<float>(), row_of_slot.const_data_ptr<int64_t>(), out.data_ptr<float>(), tokens, top_k, width);
    else combine_forward_cpu(y.const_data_ptr<at::BFloat16>(), w.const_data_ptr<float>(), row_of_slot.const_data_ptr<int64_t>(), out.data_ptr<at::BFloat16>(), tokens, top_k, width);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &y = saved[0], &weights = saved[1], &token_of_row = saved[2], &row_of_slot = saved[3];
    const at::Tensor dout = grads[0].contiguous();
    const int64_t tokens = row_of_slot.size(0), top_k = row_of_slot.size(1), width = y.size(1);
    at::Tensor dy, dw;
    if (!has_cpu_path(y)) {
      const auto wide = y.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
      const at::Tensor flat = row_of_slot.view({-1});
      const at::Tensor w_R = at::empty({y.size(0)}, weights.options()).index_copy_(0, flat, weights.reshape({-1})).to(wide);
      const at::Tensor d_RD = dout.index_select(0, token_of_row).to(wide);
      dy = (d_RD * w_R.unsqueeze(-1)).to(y.scalar_type());
      dw = (d_RD * y.to(wide)).sum(1).index_select(0, flat).view({tokens, top_k}).to(weights.scalar_type());
    } else {
      const at::Tensor w = weights.to(at::kFloat).contiguous();
      dy = at::empty_like(y);
      at::Tensor dwf = at::empty({tokens, top_k}, w.options());
      if (y.scalar_type() == at::kFloat)
        combine_backward_cpu(dout.const_data_ptr<float>(), y.const_data_ptr<float>(), w.const_data_ptr<float>(), row_of_slot.const_data_ptr<int64_t>(), dy.data_ptr<float>(), dwf.data_ptr<float>(),
                             tokens, top_k, width);
      else
        combine_backward_cpu(dout.const_data_ptr<at::BFloat16>(), y.const_data_ptr<at::BFloat16>(), w.const_data_ptr<float>(), row_of_slot.const_data_ptr<int64_t>(), dy.data_ptr<at::BFloat16>(),
                             dwf.data_ptr<float>(), tokens, top_k, width);
      dw = dwf.to(weights.scalar_type());
    }
    return {dy, dw, at::Tensor(), at::Tensor()};
  }
};

}  // namespace

Dispatch make_dispatch(const at::Tensor& topk_ids_TK, int64_t num_experts, const at::Tensor& group_T, int64_t num_groups) {
  MOEGRAFT_INVARIANT(topk_ids_TK.dim() == 2 && topk_ids_TK.scalar_type() == at::kLong, "make_dispatch: ids ", topk_ids_TK.sizes());
  const int64_t tokens = topk_ids_TK.size(0), top_k = topk_ids_TK.size(1), rows = tokens * top_k, buckets = num_experts * num_groups;
  Dispatch d;
  d.num_experts = num_experts;
  d.num_groups = num_groups;
  d.top_k = top_k;
  d.offsets.assign(buckets + 1, 0);
  // A counting sort on the host: stable in token order. On CUDA this copies T*K ids to the host once per layer.
  const at::Tensor ids = topk_ids_TK.to(at::kCPU).contiguous();
  const at::Tensor groups = group_T.defined() && num_groups > 1 ? group_T.to(at::kCPU, at::kLong).contiguous() : at::Tensor();
  const int64_t* id = ids.const_data_ptr<int64_t>();
  const int64_t* group = groups.defined() ? groups.const_data_ptr<int64_t>() : nullptr;
  const auto bucket = [&](int64_t t, int64_t k) { return id[t * top_k + k] * num_groups + (group ? group[t] : 0); };
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < top_k; ++k) ++d.offsets[bucket(t, k) + 1];
  for (int64_t b = 0; b < buckets; ++b) d.offsets[b + 1] += d.offsets[b];
  std::vector<int64_t> next(d.offsets.begin(), d.offsets.end() - 1);
  at::Tensor token_of_row = at::empty({rows}, at::kLong), row_of_slot = at::empty({tokens, top_k}, at::kLong);
  int64_t *token = token_of_row.data_ptr<int64_t>(), *row = row_of_slot.data_ptr<int64_t>();
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < top_k; ++k) {
      const int64_t r = next[bucket(t, k)]++;
      token[r] = t;
      row[t * top_k + k] = r;
    }
  d.token_of_row_R = token_of_row.to(topk_ids_TK.device());
  d.row_of_slot_TK = row_of_slot.to(topk_ids_TK.device());
  return d;
}

at::Tensor permute(const at::Tensor& x_TD, const Dispatch& dispatch) { return Permute::apply(x_TD, dispatch.token_of_row_R, dispatch.row_of_slot_TK); }

at::Tensor combine(const at::Tensor& y_RD, const at::Tensor& topk_weights_TK, const Dispatch& dispatch) {
  return Combine::apply(y_RD.contiguous(), topk_weights_TK, dispatch.token_of_row_R, dispatch.row_of_slot_TK);
}

}  // namespace moegraft::kernels
