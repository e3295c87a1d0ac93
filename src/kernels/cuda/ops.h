#pragma once
// The device's leaf operations: tensors in, tensors out, no autograd, on the current stream of the tensors' device,
// never waiting for it. What kernels/*.cpp calls for CUDA tensors when `serves` says so. float32 and bfloat16;
// statistics and sums in float32, in one order: equal calls give equal bits. Without CUDA in the build `holds` is false
// and the rest throws InvariantError.

#include "libtorch.h"
#include "moegraft/kernels/ops.h"
#include "moegraft/kernels/route.h"

namespace moegraft::kernels::cuda {

bool holds(const at::Tensor& x);  // a CUDA tensor, in a build with the kernels
inline bool serves(const at::Tensor& x) {
  return holds(x) && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16);
}

// y in `out` dtype (float32 under a float32 x, else x's), rstd float32 [rows]. wide: also y in float32, for a consumer
// that wants it unrounded. delta (undefined: none, else out's dtype): y = norm(sum), sum = x + delta in x's dtype.
// Without delta, sum is x.
struct Norm {
  at::Tensor y, y_wide, sum, rstd;
};
Norm rms_norm_forward(const at::Tensor& x_XD, const at::Tensor& delta_XD, const at::Tensor& weight_D, double eps,
                      at::ScalarType out, bool wide);
// dx of `sum`, in x's dtype: what flows through the norm plus dsum (undefined: none). dy or dy_wide may be undefined.
// dw in the weight's dtype when asked for.
struct NormGradients {
  at::Tensor dx, dw;
};
NormGradients rms_norm_backward(const at::Tensor& dy_XD, const at::Tensor& dy_wide_XD, const at::Tensor& dsum_XD,
                                const at::Tensor& sum_XD, const at::Tensor& weight_D, const at::Tensor& rstd_X,
                                bool need_dw);

// x [T, H, C] with contiguous heads (a token's stride is free); cos, sin float32 [T, C/2]. sign -1 is the backward.
at::Tensor rotary(const at::Tensor& x_THC, const at::Tensor& cos_TC, const at::Tensor& sin_TC, double sign);

// Router: logits float32 [T, E]. ids int64 [T, K] in falling order, of equal probabilities the lower index first.
Route route_forward(const at::Tensor& logits_TE, int64_t top_k, bool renormalise);
at::Tensor route_backward(const Route& routed, const at::Tensor& dweights_TK, const at::Tensor& dprobs_TE,
                          bool renormalise);  // either undefined -> dlogits

// add_routing_sums of route.h. sums float64 [M, 2E + 3], contiguous.
void add_routing_sums(const at::Tensor& sums_MX, const at::Tensor& probs_TE, const at::Tensor& ids_TK,
                      const at::Tensor& modality_T);

// ids int64 [T, K], negative: no row (num_rows then says how many have one); group int64 [T] or undefined. Ids and
// groups beyond their range count as the nearest one (the caller checks; memory stays safe).
Dispatch make_dispatch(const at::Tensor& ids_TK, int64_t num_experts, const at::Tensor& group_T, int64_t num_groups,
                       int64_t num_rows = -1);
at::Tensor gather_rows(const at::Tensor& x_TD, const at::Tensor& token_of_row_R);
// to[rows[i]] += factor * from[i], rounded once; rows int64, each at most once: no atomics, one order. `to` is
// contiguous, both of one dtype.
void add_rows(const at::Tensor& from_ND, const at::Tensor& rows_N, const at::Tensor& to_TD, double factor = 1.0);
// sum_k w[t,k] * y[row(t,k)] in y's dtype; weights float32, undefined: all ones.
at::Tensor combine(const at::Tensor& y_RD, const at::Tensor& weights_TK, const at::Tensor& row_of_slot_TK);

at::Tensor swiglu_forward(const at::Tensor& g_RF, const at::Tensor& u_RF);  // silu(g) * u
std::pair<at::Tensor, at::Tensor> swiglu_backward(const at::Tensor& dh_RF, const at::Tensor& g_RF,
                                                  const at::Tensor& u_RF);  // dg, du

// logits [X, V], targets int64 [X] -> nll float32 [X]. d (undefined: no gradient) [X, V] becomes scale * (softmax -
// onehot); it may be the logits.
at::Tensor cross_entropy_rows(const at::Tensor& logits_XV, const at::Tensor& targets_X, double scale,
                              const at::Tensor& d_XV);

}  // namespace moegraft::kernels::cuda
