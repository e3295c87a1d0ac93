#include "moegraft/ot/sinkhorn.h"

#include <ATen/ATen.h>

#include "moegraft/base/check.h"

namespace moegraft::ot {
namespace {

// Beyond this |log v| the kernel is rebuilt; below it products of kernel entries and scalings stay far from underflow.
constexpr double kAbsorbAt = 100.0;
constexpr double kSmallestColumn = 1e-250;

at::Tensor kernel(const at::Tensor& logits_NM, const at::Tensor& log_v_M, const at::Tensor& p_N) {
  // Row-normalised: every row sums to p whatever the scale of the logits.
  return at::softmax(logits_NM + log_v_M, 1).mul_(p_N.unsqueeze(1));
}

// A step in the log domain: reaches columns whose mass underflows in the kernel.
at::Tensor log_step(const at::Tensor& logits_NM, const at::Tensor& log_v_M, const at::Tensor& p_N, const at::Tensor& q_M) {
  const at::Tensor log_u_N = at::log(p_N) - at::logsumexp(logits_NM + log_v_M, 1);
  return at::log(q_M) - at::logsumexp(logits_NM + log_u_N.unsqueeze(1), 0);
}

}  // namespace

SinkhornResult sinkhorn(const at::Tensor& logits_NM, const at::Tensor& p_N, const at::Tensor& q_M, const at::Tensor& log_v_M, int64_t max_iterations, double tolerance) {
  at::NoGradGuard no_grad;
  SinkhornResult result;
  at::Tensor log_v = log_v_M.defined() ? log_v_M : at::zeros_like(q_M);
  at::Tensor kernel_NM = kernel(logits_NM, log_v, p_N);
  at::Tensor u = at::ones_like(p_N), v = at::ones_like(q_M);
  for (;; ++result.iterations) {
    const at::Tensor column_M = at::mv(kernel_NM.t(), u);
    result.error = (v * column_M - q_M).abs_().sum().item<double>();
    result.converged = result.error <= tolerance;
    if (result.converged || result.iterations == max_iterations) break;
    if (!(column_M.min().item<double>() > kSmallestColumn)) {
      log_v = log_step(logits_NM, log_v + v.log(), p_N, q_M);
      kernel_NM = kernel(logits_NM, log_v, p_N);
      u.fill_(1.0);
      v.fill_(1.0);
      continue;
    }
    v = q_M / column_M;
    u = p_N / at::mv(kernel_NM, v);
    if (!(v.log().abs_().max().item<double>() < kAbsorbAt) || !(u.max().item<double>() < 1e100)) {
      log_v = log_v + v.log();
      kernel_NM = kernel(logits_NM, log_v, p_N);
      u.fill_(1.0);
      v.fill_(1.0);
    }
  }
  result.plan_NM = kernel_NM.mul_(u.unsqueeze(1)).mul_(v);
  result.log_v_M = log_v + v.log();
  // The offset is free (row scalings undo it); centred, it stays small over many warm starts.
  result.log_v_M -= result.log_v_M.mean();
  return result;
}

void round_to_marginals(at::Tensor& plan_NM, const at::Tensor& p_N, const at::Tensor& q_M) {
  at::NoGradGuard no_grad;
  const at::Tensor rows = plan_NM.sum(1), row_scale = at::where(rows > 0, p_N / rows, at::ones_like(rows)).clamp_max_(1.0);
  plan_NM.mul_(row_scale.unsqueeze(1));
  const at::Tensor columns = plan_NM.sum(0), column_scale = at::where(columns > 0, q_M / columns, at::ones_like(columns)).clamp_max_(1.0);
  plan_NM.mul_(column_scale);
  const at::Tensor missing_N = (p_N - plan_NM.sum(1)).clamp_min_(0.0), missing_M = (q_M - plan_NM.sum(0)).clamp_min_(0.0);
  const double missing = missing_N.sum().item<double>();
  if (missing > 0) plan_NM.addr_(missing_N, missing_M, 1.0, 1.0 / missing);
}

}  // namespace moegraft::ot
