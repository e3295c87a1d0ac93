#pragma once
// The `ot` section of a run.

#include <span>
#include <string>
#include <vector>

#include "moegraft/config/config.h"

namespace moegraft::ot {

enum class Solver {
  entropic,  // projected gradient on the entropic objective (Peyré, Cuturi, Solomon 2016)
  proximal,  // proximal point in KL: sharpens to an unregularised plan (Xu et al. 2019)
};
inline constexpr config::Named<Solver> kSolvers[] = {{Solver::entropic, "entropic"}, {Solver::proximal, "proximal"}};
constexpr std::span<const config::Named<Solver>> choices_of(Solver) { return kSolvers; }

struct OtConfig {
  Solver solver = Solver::entropic;
  std::vector<double> epsilon = {0.1, 0.03, 0.01, 0.003};
  int64_t clusters = 128;
  int64_t max_iterations = 200;
  int64_t max_points = 2048;
  int64_t calibration_tokens = 8192;
  double calibration_gib = 4;
  template <class V>
  void visit_fields(V& v) {
    v("solver", solver, config::any(), "Gromov-Wasserstein solver.");
    v("epsilon", epsilon, config::any(), "Regularisation, annealed from first to last (relative to the largest cost).");
    v("clusters", clusters, config::range(2, 65536), "k-means centres for the clustered methods.");
    v("max_iterations", max_iterations, config::range(1, 1e6), "Outer iterations per epsilon.");
    v("max_points", max_points, config::range(2, 1 << 20), "Larger clouds are clustered to this size first.");
    v("calibration_tokens", calibration_tokens, config::range(1, 1e9),
      "Tokens run through the base to collect expert inputs.");
    v("calibration_gib", calibration_gib, config::range(0.0, 1e6),
      "Host memory for those inputs: 256 rows of each expert, site and modality, or as many fewer as fit.");
  }
  void validate(const std::string& path) const {
    MOEGRAFT_CHECK_USAGE(!epsilon.empty(), path, ".epsilon must have at least one value");
    for (size_t i = 0; i < epsilon.size(); ++i) {
      MOEGRAFT_CHECK_USAGE(epsilon[i] > 0, path, ".epsilon[", i, "] must be above 0, got ", epsilon[i]);
      MOEGRAFT_CHECK_USAGE(i == 0 || epsilon[i] < epsilon[i - 1], path,
                           ".epsilon must decrease from first to last, got ", epsilon);
    }
  }
};

}  // namespace moegraft::ot
