#pragma once
// Entropic Gromov-Wasserstein: a coupling of two clouds that share no coordinates, by their intra-cloud costs.
// Conventions are POT's: gradient 2 (const - h1(C1) T h2(C2)^T) with h2(b) = 2b for the square loss; objective = that
// loss without the entropy.

#include <torch/types.h>

#include <string>
#include <vector>

#include "moegraft/ot/config.h"  // Solver
#include "moegraft/ot/cost.h"

namespace moegraft::ot {

enum class Loss { square, kl };
enum class Scaling { none, max, mean };  // what each cost is divided by first

struct Settings {
  Solver solver = Solver::entropic;
  Loss loss = Loss::square;
  Scaling scaling = Scaling::max;
  std::vector<double> epsilon = {0.1, 0.03, 0.01};  // annealed in order; each starts from the plan of the one before
  int64_t max_iterations = 1000;                    // outer, for each epsilon
  int64_t anneal_iterations =
      0;  // outer, for every epsilon but the schedule's last (stages on the way need not converge); 0: max_iterations
  double tolerance = 1e-9;             // on |T - T_previous|_F
  int64_t sinkhorn_iterations = 1000;  // inner, for each outer one
  double sinkhorn_tolerance = 1e-9;    // on the marginal error, L1
  // Inner tolerance = max(sinkhorn_tolerance, slack * last change of the plan): early steps need no exact marginals. 0:
  // always exact (parity with POT).
  double slack = 0.0;
  // POT's own path, for comparisons: each projection starts cold, without over-relaxation, and its error stays in the
  // plan.
  bool plain = false;
  // Continue with sharpen_factor * epsilon, at most this often, while the rows' perplexity is above sharp_perplexity *
  // max(1, m/n). 0: keep to the schedule.
  int64_t sharpen = 0;
  double sharpen_factor = 0.5;
  double sharp_perplexity = 2.0;
};

// One epsilon of the schedule.
struct Stage {
  double epsilon = 0;
  int64_t iterations = 0, sinkhorn_iterations = 0;
  double change = 0;          // |T - T_previous|_F of the last iteration
  double marginal_error = 0;  // L1, before rounding
  double objective = 0;
  double row_perplexity = 0;
  bool converged = false;
  std::string reason;  // "plan stationary", "iteration limit", "marginals not reached"
};

struct Result {
  at::Tensor plan_NM;         // float64, marginals to 1e-9 or better
  double objective = 0;       // of the scaled costs, entropy excluded; never compare across scalings
  double marginal_error = 0;  // of plan_NM, L1 over both sides
  double row_perplexity = 0;  // p-weighted mean of exp(entropy of a row): 1 is a matching, m is uniform
  int64_t iterations = 0;     // outer, all stages
  bool converged = false;     // of the last stage
  bool rounded = false;       // marginals were repaired because Sinkhorn stopped early
  std::string reason;
  double scale_x = 1, scale_y = 1;  // what the costs were divided by
  std::vector<Stage> stages;
};

// Couples x [n] and y [m]. p_N, q_M: positive weights that sum to one (undefined: uniform). initial_NM: starting plan
// (undefined: p q^T). Everything runs in float64 on the costs' device. UserError: marginals of the wrong size, sign or
// sum, NaN, epsilon <= 0, costs on two devices.
Result solve(const Cost& x, const Cost& y, const Settings& settings, const at::Tensor& p_N = {},
             const at::Tensor& q_M = {}, const at::Tensor& initial_NM = {});

// Loss of any plan under the square or KL loss, costs as given.
double objective(const Cost& x, const Cost& y, const at::Tensor& plan_NM, Loss loss = Loss::square);

// p-weighted mean of exp(entropy) of the rows of a plan.
double row_perplexity(const at::Tensor& plan_NM);

// diag(1/p) T values_MD: where each x lies in y's space.
at::Tensor barycentric(const at::Tensor& plan_NM, const at::Tensor& values_MD);

}  // namespace moegraft::ot
