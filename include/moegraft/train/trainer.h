#pragma once
// The training loop over one ParameterRegistry: overlays on a frozen base, or a base from scratch.

#include <string>

#include "moegraft/run/run_config.h"

namespace moegraft::train {

struct TrainOutcome {
  int64_t step = 0;
  double loss = 0;
  bool stopped = false;  // by a signal: everything saved, --resume auto continues
};

// Runs config to its end. resume: "none" (a new run; refuses an existing one), "auto" (continue when there is a run, else start one) or a
// checkpoint directory of this run. UserError on a loss that is not finite: the batch is saved beside the run's checkpoints first.
TrainOutcome train(const run::RunConfig& config, const std::string& resume = "none");

// Makes paths in the config absolute, so that the run can be opened from anywhere.
void resolve_paths(run::RunConfig& config);

}  // namespace moegraft::train
