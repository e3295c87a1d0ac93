#include "moegraft/graft/initialise_lora.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <mutex>
#include <optional>
#include <set>

#include "moegraft/base/check.h"
#include "moegraft/base/clock.h"
#include "moegraft/base/progress.h"
#include "moegraft/graft/initialise_rows.h"
#include "moegraft/io/json.h"

namespace moegraft::graft {
namespace {

using adapters::FactorInit;

constexpr double kRidge = 1e-2;  // of the mean squared singular value
constexpr int64_t kIterationsPerEpsilon =
    20;  // a subspace needs no exact plan, and there are layers x sites x experts of them
constexpr int64_t kSharpen = 2;
constexpr int64_t kFactored =
    2048;  // width from which the ridge solution is kept as two factors: as a matrix it takes 1.6 GB a thread at 14,336

// Rows that the data cannot decide (fewer states than P, or a null direction) fall back to Kaiming's.
at::Tensor scaled_rows(const at::Tensor& rows_KD, int64_t rank, uint64_t seed, int64_t* directions) {
  const int64_t d = rows_KD.size(1);
  const double norm = std::sqrt(1.0 / 3.0);
  at::Tensor a_PD = kaiming_A({rank, d}, seed, "fallback").to(at::kDouble);
  const at::Tensor norms = rows_KD.norm(2, {1});
  const double smallest = norms.numel() ? norms.max().item<double>() * 1e-9 : 0.0;
  int64_t decided = 0;
  for (int64_t i = 0; i < std::min(rank, rows_KD.size(0)); ++i) {
    const double length = norms[i].item<double>();
    if (!(length > smallest)) continue;
    a_PD[i].copy_(rows_KD[i] * (norm / length));
    ++decided;
  }
  if (directions) *directions = decided;
  return a_PD.to(at::kFloat);
}

// Top right singular vectors as rows [min(P, n, D), D], leaving out directions below rounding. Signs fixed: the largest
// entry is positive.
at::Tensor top_right_vectors(const at::Tensor& x_ND, int64_t rank) {
  const auto [u, s, vh] = at::linalg_svd(x_ND, /*full_matrices=*/false);
  const double floor = s[0].item<double>() * 1e-10;
  const int64_t count = std::min(rank, (s > floor).sum().item<int64_t>());
  const at::Tensor rows = vh.slice(0, 0, count);
  const at::Tensor sign = at::sign(rows.gather(1, rows.abs().argmax(1, true)));
  return rows * sign;
}

at::Tensor checked_states(const at::Tensor& x, const char* name) {
  MOEGRAFT_CHECK(x.defined() && x.dim() == 2 && x.size(0) > 0 && x.size(1) > 0, name,
                 " must be a matrix [rows, width] with rows, got ",
                 x.defined() ? x.sizes().vec() : std::vector<int64_t>{});
  const at::Tensor d = x.detach().to(at::kCPU, at::kDouble);
  MOEGRAFT_CHECK(d.isfinite().all().item<bool>(), name, " holds NaN or Inf: the base produced them during calibration");
  return d;
}

// Told of each expert by any thread.
class Solved {
 public:
  Solved(const std::string& title, int64_t total) : progress_(title, total) {}
  void one() {
    const std::lock_guard lock(mutex_);
    progress_.update(++done_);
  }
  void finish() { progress_.finish(); }

 private:
  std::mutex mutex_;
  Progress progress_;
  int64_t done_ = 0;
};

// Inputs of one expert's site.
struct FactorContext {
  const at::Tensor &x_v, &x_t;  // [n, X] of the new modality, and of text where the method couples them
  int64_t rank;
  const ot::OtConfig& ot;
  uint64_t seed;
  GwSubspaceReport& report;  // of the solve, where there is one
};

struct FactorInitialiser {
  FactorInit init;
  at::Tensor (*A_PX)(const FactorContext&);  // null: Kaiming's, which reads no inputs
};
constexpr FactorInitialiser kInitialisers[] = {
    {FactorInit::kaiming_zero, nullptr},
    {FactorInit::gw_subspace,
     [](const FactorContext& in) { return gw_subspace_A(in.x_v, in.x_t, in.rank, in.ot, in.seed, &in.report); }},
    {FactorInit::activation_svd, [](const FactorContext& in) { return activation_svd_A(in.x_v, in.rank, in.seed); }},
};
static_assert(std::ranges::equal(kInitialisers, adapters::kFactorInits, {}, &FactorInitialiser::init,
                                 &adapters::FactorInitRow::value),
              "a function for each row of adapters/config.h's table, in its order");

struct SiteInit {
  at::Tensor A_EPX;
  io::Json report;
};

SiteInit expert_site(FactorInit method, const Calibration& calibration, int64_t layer, model::Site site,
                     at::IntArrayRef shape, int64_t modality, const ot::OtConfig& ot, uint64_t seed,
                     const std::string& name, Solved& solved) {
  const int64_t experts = shape[0], rank = shape[1];
  const bool couples = config::row_of(method).needs_ot;  // reads text's inputs too
  SiteInit init{kaiming_A(shape, seed, name), {}};
  std::vector<GwSubspaceReport> reports(experts);
  std::vector<at::Tensor> x_v(experts), x_t(experts);
  int64_t pooled = 0, fallback = 0;
  const auto enough = [&](const at::Tensor& x) { return x.defined() && x.size(0) >= rank; };
  const auto is_complete = [&](int64_t e) { return enough(x_v[e]) && (!couples || enough(x_t[e])); };
  at::Tensor pool_v, pool_t;
  for (int64_t e = 0; e < experts; ++e) {
    x_v[e] = calibration.rows(layer, site, e, modality);
    if (couples) x_t[e] = calibration.rows(layer, site, e, 0);
    if (is_complete(e)) continue;
    ++pooled;
    if (!pool_v.defined() && !pool_t.defined()) {
      pool_v = calibration.pool(layer, site, modality);
      if (couples) pool_t = calibration.pool(layer, site, 0);
    }
    if (!enough(x_v[e])) x_v[e] = pool_v;
    if (!enough(x_t[e])) x_t[e] = pool_t;
    if (!is_complete(e)) ++fallback;
  }
  at::parallel_for(0, experts, 1, [&](int64_t first, int64_t last) {
    at::NoGradGuard no_grad;
    for (int64_t e = first; e < last; ++e, solved.one()) {
      if (is_complete(e))
        init.A_EPX[e].copy_(
            kInitialisers[size_t(method)].A_PX({x_v[e], x_t[e], rank, ot, seed + uint64_t(e), reports[e]}));
    }
  });
  init.report = {{"from_pool", pooled}, {"kaiming_fallback", fallback}};
  if (couples && fallback < experts) {
    double perplexity = 0, objective = 0;
    int64_t converged = 0;
    for (const auto& r : reports) perplexity += r.row_perplexity, objective += r.objective, converged += r.converged;
    init.report["row_perplexity"] = perplexity / double(experts - fallback);
    init.report["objective"] = objective / double(experts - fallback);
    init.report["converged"] = converged;
  }
  return init;
}

}  // namespace

at::Tensor kaiming_A(at::IntArrayRef shape, uint64_t seed, const std::string& name) {
  const double bound = 1.0 / std::sqrt(double(shape.back()));
  const auto generator = at::detail::createCPUGenerator(Rng(seed, "graft.lora." + name).derive_seed());
  return at::rand(shape, generator, at::TensorOptions(at::kFloat)).mul_(2.0 * bound).sub_(bound);
}

at::Tensor gw_subspace_A(const at::Tensor& x_v_given, const at::Tensor& x_t_given, int64_t rank, const ot::OtConfig& ot,
                         uint64_t seed, GwSubspaceReport* report) {
  at::NoGradGuard no_grad;
  const at::Tensor x_v = checked_states(x_v_given, "gw_subspace: x_v"),
                   x_t = checked_states(x_t_given, "gw_subspace: x_t");
  MOEGRAFT_CHECK(x_v.size(1) == x_t.size(1), "gw_subspace: x_v and x_t must have one width, got ", x_v.size(1), " and ",
                 x_t.size(1));
  MOEGRAFT_CHECK(rank >= 1, "gw_subspace: rank must be at least 1, got ", rank);
  ot::Settings settings = solver_settings(ot, x_v.size(0), x_t.size(0));
  settings.max_iterations = std::min(settings.max_iterations, kIterationsPerEpsilon);
  settings.sharpen = kSharpen;
  const ot::Result plan = ot::solve(ot::Cost::squared_euclidean(x_v), ot::Cost::squared_euclidean(x_t), settings);
  const at::Tensor aligned = ot::barycentric(plan.plan_NM, x_t);
  // M^T = (X^T X + l I)^-1 X^T Y = X^T (X X^T + l I)^-1 Y: solved on the smaller side.
  const int64_t n = x_v.size(0), d = x_v.size(1);
  const bool wide = d > n;
  at::Tensor gram = wide ? at::mm(x_v, x_v.t()) : at::mm(x_v.t(), x_v);
  const double ridge = kRidge * x_v.square().sum().item<double>() / double(std::min(n, d)) + 1e-300;
  gram.diagonal().add_(ridge);
  const at::Tensor factor = at::linalg_cholesky(gram);
  const at::Tensor solved = at::cholesky_solve(wide ? aligned : at::mm(x_v.t(), aligned), factor);
  at::Tensor rows;
  if (wide && d >= kFactored) {  // X M^T = X X^T (X X^T + l I)^-1 Y = Y - l (X X^T + l I)^-1 Y
    const at::Tensor top = top_right_vectors(aligned - ridge * solved, rank);
    rows = at::mm(at::mm(top, solved.t()), x_v);
  } else {
    const at::Tensor m_t = wide ? at::mm(x_v.t(), solved) : solved;
    const at::Tensor top = top_right_vectors(at::mm(x_v, m_t), rank);  // U^T
    rows = at::mm(top, m_t.t());
  }
  int64_t directions = 0;
  const at::Tensor a_PD = scaled_rows(rows, rank, seed, &directions);
  if (report) *report = {plan.objective, plan.row_perplexity, plan.converged, directions};
  return a_PD;
}

at::Tensor activation_svd_A(const at::Tensor& x_v_given, int64_t rank, uint64_t seed) {
  at::NoGradGuard no_grad;
  const at::Tensor x_v = checked_states(x_v_given, "activation_svd: x_v");
  MOEGRAFT_CHECK(rank >= 1, "activation_svd: rank must be at least 1, got ", rank);
  return scaled_rows(top_right_vectors(x_v, rank), rank, seed, nullptr);
}

double estimate_solve_seconds(const CalibrationPlan& plan, const ot::OtConfig& ot) {
  const int64_t threads = at::get_num_threads();
  double seconds = 0;
  for (const auto& s : plan.solves) {
    const at::Tensor states = kaiming_A({2, plan.rows, s.width}, 1, "estimate");
    const auto start = std::chrono::steady_clock::now();
    at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) gw_subspace_A(states[0], states[1], s.rank, ot, uint64_t(i));
    });
    seconds += seconds_since(start) * double(s.count) / double(threads);
  }
  return seconds;
}

std::string initialise_lora(adapters::Adapter& adapter, FactorInit method, const Calibration* calibration,
                            int64_t modality, const ot::OtConfig& ot, uint64_t seed) {
  at::NoGradGuard no_grad;
  adapter.initialise();
  if (adapter.factors().empty()) return io::Json{{"kind", config::name_of(adapter.config().kind)}}.dump();
  const bool calibrated = config::row_of(method).needs_calibration &&
                          std::any_of(adapter.factors().begin(), adapter.factors().end(),
                                      [](const auto& f) { return adapters::is_ffn_site(f.site); });
  MOEGRAFT_INVARIANT(!calibrated || calibration, "initialise_lora: ", config::name_of(method), " needs a calibration");
  const auto start = std::chrono::steady_clock::now();
  io::Json report = {{"method", config::name_of(method)}, {"sites", io::Json::object()}};
  std::map<std::pair<int64_t, model::Site>, SiteInit> done;  // of a layer: gate and up see the same input
  std::set<std::pair<int64_t, model::Site>> sites;
  int64_t experts = 0;
  // A dense FFN is one expert.
  const auto expert_shape = [](const auto& factor) {
    std::vector<int64_t> shape = factor.A.sizes().vec();
    if (shape.size() == 2) shape.insert(shape.begin(), 1);
    return shape;
  };
  const auto key_of = [](const auto& factor) {
    return std::pair{factor.layer, factor.site == model::Site::up ? model::Site::gate : factor.site};
  };
  for (const auto& factor : adapter.factors())
    if (calibrated && adapters::is_ffn_site(factor.site) && sites.insert(key_of(factor)).second)
      experts += expert_shape(factor).front();
  std::optional<Solved> solved;
  if (experts > 0) solved.emplace("initialise adapters (" + config::name_of(method) + "), experts", experts);
  for (const auto& factor : adapter.factors()) {
    if (!calibrated || !adapters::is_ffn_site(factor.site)) {
      factor.A.copy_(kaiming_A(factor.A.sizes(), seed, factor.name));
      continue;
    }
    const auto key = key_of(factor);
    auto found = done.find(key);
    if (found == done.end()) {
      std::erase_if(done, [&](const auto& earlier) { return earlier.first.first != factor.layer; });
      found = done.emplace(key, expert_site(method, *calibration, factor.layer, key.second, expert_shape(factor),
                                            modality, ot, seed, factor.name, *solved))
                  .first;
      report["sites"][factor.name] = found->second.report;
    }
    factor.A.copy_(found->second.A_EPX.view(factor.A.sizes()));
  }
  if (solved) solved->finish();
  report["seconds"] = seconds_since(start);
  return report.dump();
}

}  // namespace moegraft::graft
