#include <chrono>
#include <iostream>
#include <memory>

#include "command.h"
#include "moegraft/base/check.h"
#include "moegraft/base/clock.h"
#include "moegraft/base/log.h"
#include "moegraft/io/json.h"
#include "moegraft/io/safetensors.h"
#include "moegraft/ot/gromov_wasserstein.h"
#include "moegraft/ot/kmeans.h"

namespace moegraft::tools {
namespace {

struct OtOptions {
  std::string x, y, tensor_x, tensor_y, solver = "entropic", scaling = "max", cost = "sqeuclidean", output;
  std::vector<double> epsilon = {0.1, 0.03, 0.01};
  int64_t clusters = 0, max_iterations = 200, sinkhorn_iterations = 1000, sharpen = 0;
  double tolerance = 1e-9, sinkhorn_tolerance = 1e-9, slack = 0.1;
  uint64_t seed = 0;
  bool json = false;
};

at::Tensor read_cloud(const std::string& path, const std::string& name) {
  const io::SafetensorsFile file(path);
  const auto names = file.names();
  MOEGRAFT_CHECK(!name.empty() || names.size() == 1, path, " holds ", names.size(),
                 " tensors: name one with --tensor-x / --tensor-y");
  const at::Tensor x = file.tensor(name.empty() ? names[0] : name);
  MOEGRAFT_CHECK(x.dim() == 2 && x.numel() > 0 && at::isFloatingType(x.scalar_type()), path,
                 ": a cloud must be a floating-point matrix [points, dimensions], got ", x.dtype().name(), " ",
                 x.sizes().vec());
  return x.to(at::kDouble);
}

struct Cloud {
  at::Tensor points, weights, assignment;
};

Cloud centres(const at::Tensor& x, int64_t clusters, uint64_t seed) {
  if (clusters == 0 || clusters >= x.size(0)) return {x, {}, {}};
  const ot::KMeansResult k = ot::kmeans(x, clusters, {.seed = seed});
  return {k.centres_KD, k.counts_K.to(at::kDouble) / double(x.size(0)), k.assignment_N};
}

void run_ot(const OtOptions& o) {
  const auto start = std::chrono::steady_clock::now();
  const Cloud x = centres(read_cloud(o.x, o.tensor_x), o.clusters, o.seed),
              y = centres(read_cloud(o.y, o.tensor_y), o.clusters, o.seed + 1);
  ot::Settings s;
  s.solver = config::parse_choice<ot::Solver>("--solver", o.solver);
  s.scaling = o.scaling == "max" ? ot::Scaling::max : o.scaling == "mean" ? ot::Scaling::mean : ot::Scaling::none;
  s.epsilon = o.epsilon;
  s.max_iterations = o.max_iterations;
  s.tolerance = o.tolerance;
  s.sinkhorn_iterations = o.sinkhorn_iterations;
  s.sinkhorn_tolerance = o.sinkhorn_tolerance;
  s.slack = o.slack;
  s.sharpen = o.sharpen;
  const auto cost = [&](const at::Tensor& points) {
    return o.cost == "euclidean" ? ot::Cost::euclidean(points) : ot::Cost::squared_euclidean(points);
  };
  log::info("coupling ", x.points.size(0), " with ", y.points.size(0), " points");
  const ot::Result r = ot::solve(cost(x.points), cost(y.points), s, x.weights, y.weights);
  const double seconds = seconds_since(start);
  if (!o.output.empty()) {
    io::TensorMap tensors = {{"plan", r.plan_NM}, {"p", r.plan_NM.sum(1)}, {"q", r.plan_NM.sum(0)}};
    if (x.assignment.defined()) tensors.insert({{"assignment_x", x.assignment}, {"centres_x", x.points}});
    if (y.assignment.defined()) tensors.insert({{"assignment_y", y.assignment}, {"centres_y", y.points}});
    io::save_safetensors(o.output, tensors);
    log::info("wrote ", o.output);
  }
  for (const ot::Stage& stage : r.stages) {
    log::info("epsilon ", stage.epsilon, ": objective ", stage.objective, ", row perplexity ", stage.row_perplexity,
              ", ", stage.iterations, " iterations (", stage.sinkhorn_iterations, " inner), marginal error ",
              stage.marginal_error, ", ", stage.reason);
  }
  if (!o.json) {
    std::cout << "objective " << r.objective << "  marginal error " << r.marginal_error << "  row perplexity "
              << r.row_perplexity << "  " << r.reason << "  " << seconds << " s\n";
    return;
  }
  io::Json stages = io::Json::array();
  for (const ot::Stage& stage : r.stages) {
    stages.push_back({{"epsilon", stage.epsilon},
                      {"iterations", stage.iterations},
                      {"sinkhorn_iterations", stage.sinkhorn_iterations},
                      {"change", stage.change},
                      {"marginal_error", stage.marginal_error},
                      {"objective", stage.objective},
                      {"row_perplexity", stage.row_perplexity},
                      {"converged", stage.converged},
                      {"reason", stage.reason}});
  }
  const io::Json j = {{"points_x", x.points.size(0)},
                      {"points_y", y.points.size(0)},
                      {"objective", r.objective},
                      {"marginal_error", r.marginal_error},
                      {"row_perplexity", r.row_perplexity},
                      {"iterations", r.iterations},
                      {"converged", r.converged},
                      {"rounded", r.rounded},
                      {"reason", r.reason},
                      {"scale_x", r.scale_x},
                      {"scale_y", r.scale_y},
                      {"seconds", seconds},
                      {"stages", stages}};
  std::cout << j.dump() << "\n";
}

}  // namespace

void add_ot_command(CLI::App& app) {
  auto options = std::make_shared<OtOptions>();
  CLI::App* ot = app.add_subcommand("ot", "Couple two point clouds by Gromov-Wasserstein");
  ot->add_option("--x", options->x, "safetensors file with a cloud [n, d]")->required();
  ot->add_option("--y", options->y, "safetensors file with a cloud [m, d']")->required();
  ot->add_option("--tensor-x", options->tensor_x, "Name of the tensor in --x (default: its only one)");
  ot->add_option("--tensor-y", options->tensor_y, "Name of the tensor in --y (default: its only one)");
  ot->add_option("--solver", options->solver, "entropic | proximal")
      ->check(CLI::IsMember({"entropic", "proximal"}))
      ->capture_default_str();
  ot->add_option("--epsilon", options->epsilon, "Regularisation of the scaled costs, annealed from first to last")
      ->delimiter(',')
      ->capture_default_str();
  ot->add_option("--scaling", options->scaling, "Divide each cost by its max or mean")
      ->check(CLI::IsMember({"max", "mean", "none"}))
      ->capture_default_str();
  ot->add_option("--cost", options->cost, "sqeuclidean (factored) | euclidean")
      ->check(CLI::IsMember({"sqeuclidean", "euclidean"}))
      ->capture_default_str();
  ot->add_option("--clusters", options->clusters,
                 "Couple this many k-means centres instead of the points; 0: the points")
      ->check(not_negative())
      ->capture_default_str();
  ot->add_option("--max-iterations", options->max_iterations, "Outer iterations per epsilon")
      ->check(positive())
      ->capture_default_str();
  ot->add_option("--sinkhorn-iterations", options->sinkhorn_iterations, "Inner iterations per outer one")
      ->check(positive())
      ->capture_default_str();
  ot->add_option("--tolerance", options->tolerance, "Change of the plan (Frobenius) that counts as stationary")
      ->check(not_negative())
      ->capture_default_str();
  ot->add_option("--slack", options->slack, "Inner tolerance as a share of the last change; 0: always exact")
      ->check(not_negative())
      ->capture_default_str();
  ot->add_option("--sharpen", options->sharpen, "Halve epsilon up to this often until the plan is sharp")
      ->check(not_negative())
      ->capture_default_str();
  ot->add_option("--seed", options->seed, "Seed of k-means")->capture_default_str();
  ot->add_option("-o,--output", options->output, "Write the plan (and centres) as safetensors");
  ot->add_flag("--json", options->json, "Print one JSON object");
  ot->footer(
      "Example: moegraft ot --x codebook.safetensors --y embedding.safetensors --epsilon 0.1,0.03,0.01 -o "
      "plan.safetensors --json");
  ot->callback([options] { run_ot(*options); });
}

}  // namespace moegraft::tools
