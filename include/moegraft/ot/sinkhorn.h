#pragma once
// Entropic optimal transport on logits: the plan T = diag(u) exp(logits) diag(v) with T 1 = p, T^T 1 = q (Cuturi 2013), stabilised by keeping
// log v and absorbing it into the kernel (Schmitzer 2019, arXiv:1610.06519): no overflow at any epsilon, and inner steps are plain products.

#include <torch/types.h>

namespace moegraft::ot {

struct SinkhornResult {
  at::Tensor plan_NM;   // rows sum to p up to rounding
  at::Tensor log_v_M;   // pass it on to warm-start the next call
  double error = 0;     // |T^T 1 - q|_1
  int64_t iterations = 0;
  bool converged = false;
};

// logits_NM = -cost / epsilon, float64; p_N and q_M positive. log_v_M may be undefined (zeros). Stops when error <= tolerance.
SinkhornResult sinkhorn(const at::Tensor& logits_NM, const at::Tensor& p_N, const at::Tensor& q_M, const at::Tensor& log_v_M, int64_t max_iterations, double tolerance);

// The nearest plan with exact marginals by scaling and a rank-one correction (Altschuler et al. 2017, algorithm 2). In place on plan_NM.
void round_to_marginals(at::Tensor& plan_NM, const at::Tensor& p_N, const at::Tensor& q_M);

}  // namespace moegraft::ot
