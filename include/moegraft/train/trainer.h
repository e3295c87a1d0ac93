#pragma once
// The training loop over one ParameterRegistry: overlays on a frozen base, or a base from scratch.

#include <functional>
#include <memory>
#include <string>

#include "moegraft/distributed/world.h"
#include "moegraft/run/run_config.h"

namespace moegraft::train {

struct TrainOutcome {
  int64_t step = 0;
  double loss = 0;
  bool stopped = false;       // by a signal: everything saved, --resume auto continues
  bool ended_before = false;  // a finished run was called again: nothing was done
};

// Runs config to its end. resume: "none" (a new run; refuses an existing one), "auto" (continue when there is a run,
// else start one) or a checkpoint directory: of this run, its newest; of another run, from which a new run.dir then
// branches. accept_data: goes on with data sets that changed. UserError on a loss that is not finite: the batch is
// saved beside the run's checkpoints first. world: the processes that train together, every one of which calls this
// alike; null: this one alone.
TrainOutcome train(const run::RunConfig& config, const std::string& resume = "none",
                   std::shared_ptr<distributed::World> world = nullptr, bool accept_data = false);

// train() as one of several processes, from its start: reads the config, meets the others, makes sure that all mean the
// same. What is wrong in one process ends all of them with one line each.
TrainOutcome train_together(const distributed::LaunchEnvironment& environment,
                            const std::function<run::RunConfig()>& read_config, const std::string& resume = "none",
                            bool accept_data = false);

// Makes paths in the config absolute, so that the run can be opened from anywhere.
void resolve_paths(run::RunConfig& config);

}  // namespace moegraft::train
