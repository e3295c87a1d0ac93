#include "moegraft/ot/gromov_wasserstein.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "moegraft/base/check.h"
#include "moegraft/ot/sinkhorn.h"

namespace moegraft::ot {
namespace {

constexpr double kMarginalTolerance = 1e-9;   // what a returned plan keeps
constexpr double kWeightSumTolerance = 1e-6;  // what a user's marginals may miss one by; they are renormalised
constexpr double kLogFloor = 1e-18;           // POT's guard inside the KL loss

// The loss L(a,b) = f1(a) + f2(b) - h1(a) h2(b) split into what the plan changes and what it does not.
struct Split {
  Cost h1_x, h2_y;
  at::Tensor const_N, const_M;  // f1(C1) p and f2(C2) q
};

Split split_loss(const Cost& x, const Cost& y, const at::Tensor& p_N, const at::Tensor& q_M, Loss loss) {
  if (loss == Loss::square) {
    Cost h2 = y;
    h2.scale(2.0);
    return {x, h2, x.squares_times(p_N), y.squares_times(q_M)};
  }
  const at::Tensor a = x.matrix(), b = y.matrix();
  return {x, Cost::dense((b + kLogFloor).log()), at::mv(a * (a + kLogFloor).log() - a, p_N), at::mv(b, q_M)};
}

// factor * h1(C1) T h2(C2)^T, through the thin sides first.
at::Tensor cross(const Cost& x, const Cost& y, const at::Tensor& plan_NM, double factor) {
  at::Tensor t = x.factored() ? at::mm(x.right().t(), plan_NM) : plan_NM;
  t = at::mm(t, y.factored() ? y.right() : y.matrix().t()).mul_(factor);
  t = at::mm(x.factored() ? x.left() : x.matrix(), t);
  return y.factored() ? at::mm(t, y.left().t()) : t;
}

double split_objective(const Split& s, const at::Tensor& plan_NM) {
  const double linear =
      (plan_NM.sum(1) * s.const_N).sum().item<double>() + (plan_NM.sum(0) * s.const_M).sum().item<double>();
  return linear - cross(s.h1_x, s.h2_y, plan_NM, 1.0).mul_(plan_NM).sum().item<double>();
}

at::Tensor checked_weights(const at::Tensor& weights, int64_t size, at::Device device, const char* name) {
  if (!weights.defined()) return at::full({size}, 1.0 / double(size), at::TensorOptions(at::kDouble).device(device));
  MOEGRAFT_CHECK(weights.dim() == 1 && weights.size(0) == size, "marginal ", name,
                 " must have one weight for each of the ", size, " points, got shape ", weights.sizes().vec());
  const at::Tensor w = weights.detach().to(at::TensorOptions(at::kDouble).device(device));
  MOEGRAFT_CHECK((w > 0).all().item<bool>() && w.isfinite().all().item<bool>(), "marginal ", name,
                 " must be positive and finite: leave out points without weight");
  const double sum = w.sum().item<double>();
  MOEGRAFT_CHECK(std::abs(sum - 1.0) <= kWeightSumTolerance, "marginal ", name, " must sum to 1, got ", sum,
                 ": divide it by its sum");
  return w / sum;
}

double scaling_of(const Cost& cost, Scaling scaling) {
  const double s = scaling == Scaling::max ? cost.max() : scaling == Scaling::mean ? cost.mean() : 1.0;
  return s > 0 ? s : 1.0;  // all points equal
}

void check_settings(const Settings& s) {
  MOEGRAFT_CHECK_USAGE(!s.epsilon.empty(), "ot.epsilon must name at least one value");
  for (double e : s.epsilon) MOEGRAFT_CHECK_USAGE(std::isfinite(e) && e > 0, "ot.epsilon must be positive, got ", e);
  MOEGRAFT_CHECK_USAGE(s.sharpen == 0 || (s.sharpen_factor > 0 && s.sharpen_factor < 1),
                       "ot.sharpen_factor must be between 0 and 1, got ", s.sharpen_factor);
  MOEGRAFT_CHECK_USAGE(s.max_iterations >= 1 && s.sinkhorn_iterations >= 1,
                       "ot: iteration limits must be at least 1, got ", s.max_iterations, " and ",
                       s.sinkhorn_iterations);
}

// Walks the schedule; holds the plan, the logits of the proximal solver and the warm-started potential.
class Descent {
 public:
  Descent(Split split, at::Tensor p_N, at::Tensor q_M, const Settings& settings, const at::Tensor& initial_NM)
      : split_(std::move(split)),
        p_N_(std::move(p_N)),
        q_M_(std::move(q_M)),
        settings_(settings),
        symmetric_(split_.h1_x.symmetric() && split_.h2_y.symmetric()) {
    if (!symmetric_) {
      x_t_ = split_.h1_x.transposed();
      y_t_ = split_.h2_y.transposed();
    }
    plan_NM = initial_NM.defined() ? initial_NM : at::outer(p_N_, q_M_);
    if (settings_.solver == Solver::proximal) {
      // KL(T | T_previous) adds log T_previous to the logits; row and column factors of it are the potentials'
      // business.
      logits_NM_ = initial_NM.defined() ? initial_NM.clamp_min(1e-300).log() : at::zeros_like(plan_NM);
    }
  }

  Stage run(double epsilon, int64_t max_iterations) {
    Stage stage;
    stage.epsilon = epsilon;
    if (settings_.solver == Solver::entropic && sinkhorn_.log_v_M.defined())
      sinkhorn_.log_v_M = sinkhorn_.log_v_M * (previous_epsilon_ / epsilon);
    previous_epsilon_ = epsilon;
    bool marginals = true;
    stage.change = 1.0;
    while (stage.iterations < max_iterations) {
      const double inner_tolerance =
          std::max(settings_.sinkhorn_tolerance, settings_.slack * std::min(1.0, stage.change));
      SinkhornResult inner = step(epsilon, inner_tolerance);
      stage.change = plan_NM.sub_(inner.plan_NM).norm().item<double>();
      plan_NM = std::move(inner.plan_NM);
      ++stage.iterations;
      stage.sinkhorn_iterations += inner.iterations;
      stage.marginal_error = inner.error;
      marginals = inner.converged;
      MOEGRAFT_CHECK(std::isfinite(stage.change), "Gromov-Wasserstein diverged at epsilon ", epsilon,
                     ": raise ot.epsilon");
      if (stage.change <= settings_.tolerance) break;
    }
    const bool stationary = stage.change <= settings_.tolerance;
    stage.converged = stationary && marginals;
    stage.reason = !stationary ? "iteration limit" : marginals ? "plan stationary" : "marginals not reached";
    stage.objective = split_objective(split_, plan_NM);
    stage.row_perplexity = row_perplexity(plan_NM);
    return stage;
  }

  at::Tensor plan_NM;

 private:
  SinkhornResult step(double epsilon, double tolerance) {
    // -gradient / epsilon without the gradient's constant part: it is a row plus a column term, which the potentials
    // absorb.
    at::Tensor logits_NM = cross(split_.h1_x, split_.h2_y, plan_NM, (symmetric_ ? 2.0 : 1.0) / epsilon);
    if (!symmetric_) logits_NM.add_(cross(x_t_, y_t_, plan_NM, 1.0 / epsilon));
    const at::Tensor column_M = split_.const_M * (-2.0 / epsilon);
    if (settings_.solver == Solver::proximal) {
      if (settings_.plain) {
        logits_NM = logits_NM + plan_NM.clamp_min(1e-300).log();
        sinkhorn_ = {at::log(q_M_) - at::logsumexp(logits_NM - (split_.const_N * (2.0 / epsilon)).unsqueeze(1), 0), 1.0,
                     false};
        return sinkhorn(logits_NM, p_N_, q_M_, sinkhorn_, settings_.sinkhorn_iterations, tolerance);
      }
      logits_NM_.add_(logits_NM);
      sinkhorn_.log_v_M = sinkhorn_.log_v_M.defined() ? sinkhorn_.log_v_M + column_M : column_M;
      return sinkhorn(logits_NM_, p_N_, q_M_, sinkhorn_, settings_.sinkhorn_iterations, tolerance);
    }
    if (settings_.plain) {
      // u = 1 on the full gradient, as POT starts each projection: v follows from the columns, the kernel's first build
      // is the u update.
      sinkhorn_ = {at::log(q_M_) - at::logsumexp(logits_NM - (split_.const_N * (2.0 / epsilon)).unsqueeze(1), 0), 1.0,
                   false};
    } else if (!sinkhorn_.log_v_M.defined()) {
      sinkhorn_.log_v_M = column_M;
    }
    return sinkhorn(logits_NM, p_N_, q_M_, sinkhorn_, settings_.sinkhorn_iterations, tolerance);
  }

  Split split_;
  Cost x_t_, y_t_;
  at::Tensor p_N_, q_M_;
  const Settings& settings_;
  bool symmetric_;
  at::Tensor logits_NM_;
  SinkhornState sinkhorn_;
  double previous_epsilon_ = 1.0;
};

}  // namespace

Result solve(const Cost& x_given, const Cost& y_given, const Settings& settings, const at::Tensor& p_given,
             const at::Tensor& q_given, const at::Tensor& initial_given) {
  at::NoGradGuard no_grad;
  check_settings(settings);
  MOEGRAFT_CHECK(x_given.device() == y_given.device(), "Gromov-Wasserstein needs both clouds on one device, got ",
                 x_given.device(), " and ", y_given.device());
  const int64_t n = x_given.size(), m = y_given.size();
  const at::Tensor p_N = checked_weights(p_given, n, x_given.device(), "p"),
                   q_M = checked_weights(q_given, m, x_given.device(), "q");
  at::Tensor initial_NM;
  if (initial_given.defined()) {
    MOEGRAFT_CHECK(initial_given.dim() == 2 && initial_given.size(0) == n && initial_given.size(1) == m,
                   "the initial plan must be [", n, ", ", m, "], got ", initial_given.sizes().vec());
    initial_NM =
        initial_given.detach().to(at::TensorOptions(at::kDouble).device(x_given.device()), false, true).contiguous();
    MOEGRAFT_CHECK((initial_NM >= 0).all().item<bool>() && initial_NM.isfinite().all().item<bool>(),
                   "the initial plan must be finite and not negative");
  }
  Result result;
  Cost x = x_given, y = y_given;
  result.scale_x = scaling_of(x, settings.scaling);
  result.scale_y = scaling_of(y, settings.scaling);
  x.scale(1.0 / result.scale_x);
  y.scale(1.0 / result.scale_y);

  Descent descent(split_loss(x, y, p_N, q_M, settings.loss), p_N, q_M, settings, initial_NM);
  const int64_t anneal_iterations = settings.anneal_iterations > 0
                                        ? std::min(settings.anneal_iterations, settings.max_iterations)
                                        : settings.max_iterations;
  for (size_t i = 0; i < settings.epsilon.size(); ++i) {
    result.stages.push_back(descent.run(
        settings.epsilon[i], i + 1 == settings.epsilon.size() ? settings.max_iterations : anneal_iterations));
  }
  const double sharp = settings.sharp_perplexity * std::max(1.0, double(m) / double(n));
  for (int64_t i = 0; i < settings.sharpen && result.stages.back().row_perplexity > sharp; ++i) {
    result.stages.push_back(descent.run(result.stages.back().epsilon * settings.sharpen_factor, anneal_iterations));
  }

  result.plan_NM = std::move(descent.plan_NM);
  auto marginal_error = [&] {
    return (result.plan_NM.sum(1) - p_N).abs_().sum().item<double>() +
           (result.plan_NM.sum(0) - q_M).abs_().sum().item<double>();
  };
  result.marginal_error = marginal_error();
  result.rounded = result.marginal_error > kMarginalTolerance && !settings.plain;
  if (result.rounded) {
    round_to_marginals(result.plan_NM, p_N, q_M);
    result.marginal_error = marginal_error();
  }
  result.objective = settings.plain ? result.stages.back().objective : objective(x, y, result.plan_NM, settings.loss);
  result.row_perplexity = row_perplexity(result.plan_NM);
  for (const Stage& stage : result.stages) result.iterations += stage.iterations;
  result.converged = result.stages.back().converged;
  result.reason = result.stages.back().reason;
  return result;
}

double objective(const Cost& x, const Cost& y, const at::Tensor& plan_NM, Loss loss) {
  at::NoGradGuard no_grad;
  const at::Tensor plan = plan_NM.to(at::kDouble);
  return split_objective(split_loss(x, y, plan.sum(1), plan.sum(0), loss), plan);
}

double row_perplexity(const at::Tensor& plan_NM) {
  const at::Tensor p_N = plan_NM.sum(1), share_NM = plan_NM / p_N.clamp_min(1e-300).unsqueeze(1);
  return (at::special_xlogy(share_NM, share_NM).sum(1).neg_().exp_() * p_N).sum().item<double>();
}

at::Tensor barycentric(const at::Tensor& plan_NM, const at::Tensor& values_MD) {
  MOEGRAFT_CHECK(values_MD.dim() == 2 && plan_NM.dim() == 2 && plan_NM.size(1) == values_MD.size(0), "a plan ",
                 plan_NM.sizes().vec(), " does not fit values ", values_MD.sizes().vec());
  return at::mm(plan_NM, values_MD.to(plan_NM.scalar_type())) / plan_NM.sum(1, true);
}

}  // namespace moegraft::ot
