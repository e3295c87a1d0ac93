#pragma once
// Entropic optimal transport on logits: the plan T = diag(u) exp(logits) diag(v) with T 1 = p, T^T 1 = q (Cuturi 2013),
// stabilised by keeping log v and absorbing it into the kernel (Schmitzer 2019, arXiv:1610.06519): no overflow at any
// epsilon, and an inner step is one pass over the kernel. Over-relaxed (Thibault et al. 2021, arXiv:1711.01851) with a
// factor that follows the observed rate: sharp plans need it.

#include <torch/types.h>

namespace moegraft::ot {

// What warm-starts the next call on similar logits.
struct SinkhornState {
  at::Tensor log_v_M;       // undefined: zeros
  double relaxation = 1.0;  // 1: plain Sinkhorn
  bool adapt = true;        // let the relaxation follow the observed rate
};

struct SinkhornResult {
  at::Tensor plan_NM;  // rows sum to p up to rounding
  double error = 0;    // |T^T 1 - q|_1
  int64_t iterations = 0;
  bool converged = false;
};

// logits_NM = -cost / epsilon, float64; p_N and q_M float64 and positive. Stops when the marginal error is <=
// tolerance. Same result for any number of threads.
SinkhornResult sinkhorn(const at::Tensor& logits_NM, const at::Tensor& p_N, const at::Tensor& q_M, SinkhornState& state,
                        int64_t max_iterations, double tolerance);

// The nearest plan with exact marginals by scaling and a rank-one correction (Altschuler et al. 2017, algorithm 2). In
// place on plan_NM.
void round_to_marginals(at::Tensor& plan_NM, const at::Tensor& p_N, const at::Tensor& q_M);

}  // namespace moegraft::ot
