#pragma once
// Keeps a fixed-size uniform sample of the inputs of expert sites while the base runs, for initialisations that look at
// activations.

#include <torch/types.h>

#include <cstdint>
#include <map>
#include <tuple>
#include <vector>

#include "moegraft/base/rng.h"
#include "moegraft/model/decoder.h"
#include "moegraft/run/run_config.h"

namespace moegraft::graft {

// Whether an adapter's initialisation looks at activations.
bool needs_calibration(const adapters::AdapterConfig& adapter);

// What the initialisations that look at activations take, from shapes alone.
struct CalibrationPlan {
  // Gromov-Wasserstein problems of one site, where the initialisation has any: up shares gate's.
  struct Solves {
    int64_t count = 0, width = 0, rank = 0;
  };
  int64_t rows = 0;    // kept of each (layer, site, expert, modality); 0: no adapter asks for any
  int64_t wanted = 0;  // without the bound
  int64_t bytes = 0;   // host memory, at most
  std::vector<Solves> solves;
  int64_t num_solves() const;
};
// 256 rows, or fewer so that all of them fit ot.calibration_gib; never fewer than the largest rank: UserError when
// those do not fit.
CalibrationPlan plan_calibration(const model::DecoderSpec& spec, const run::RunConfig& config);
// Seconds that the plan's solves take here: one of each width on every thread, timed now on random states (real ones
// may take more or fewer iterations).
double estimate_solve_seconds(const CalibrationPlan& plan, const ot::OtConfig& ot);

// Pass it as ForwardOptions::sites. Reservoir sampling (Vitter's algorithm R) per (layer, site, expert, modality), a
// function of the seed and of the rows' order alone. Rows are kept on the CPU in the dtype that they come in: what a
// bf16 base computes fits bf16.
class Calibration : public model::SiteObserver {
 public:
  Calibration(int64_t rows_per_key, uint64_t seed);

  void observe_experts(int64_t layer, model::Site site, const at::Tensor& rows_RX, const std::vector<int64_t>& offsets,
                       int64_t num_modalities) override;

  // [n, X], n <= rows_per_key; undefined when the key was never seen. Site up reads gate's rows: they are the same.
  at::Tensor rows(int64_t layer, model::Site site, int64_t expert, int64_t modality) const;
  // A sample of at most rows_per_key rows over all experts of the layer.
  at::Tensor pool(int64_t layer, model::Site site, int64_t modality) const;
  int64_t seen(int64_t layer, model::Site site, int64_t expert, int64_t modality) const;
  int64_t rows_per_key() const { return rows_per_key_; }

 private:
  using Key = std::tuple<int64_t, model::Site, int64_t, int64_t>;  // layer, site, expert, modality
  struct Reservoir {
    Rng rng;
    int64_t seen = 0;
    at::Tensor rows_NX;
  };
  const Reservoir* find(int64_t layer, model::Site site, int64_t expert, int64_t modality) const;

  int64_t rows_per_key_;
  uint64_t seed_;
  std::map<Key, Reservoir> reservoirs_;
};

}  // namespace moegraft::graft
