#pragma once
// How a run starts: what all processes must agree on before their first exchange, who makes the run, and the checkpoint
// that all begin with.

#include <optional>
#include <string>
#include <vector>

#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/distributed/world.h"
#include "moegraft/graft/grafted_model.h"
#include "moegraft/planning/memory.h"
#include "moegraft/run/run_config.h"
#include "moegraft/run/run_dir.h"
#include "moegraft/train/config.h"
#include "moegraft/train/optimizer.h"

namespace moegraft::train {

AdamW make_optimizer(model::ParameterRegistry& registry, const TrainConfig& section, std::vector<bool> owned = {});

// Whether this config can run on so many processes, as far as one of them can tell. UsageError or UserError.
void check_layout(const run::RunConfig& config, int64_t world_size);
// What must be equal everywhere: every key of the config, the program, the base's files.
std::vector<distributed::World::Fact> facts_of(const run::RunConfig& config, const std::string& resume);

// Where rank 0 keeps a frozen base's experts while it makes a new run by itself; none: where the config says. It gives
// that model up right after, so nothing is loaded for it that no initialisation needs, and nothing page-locked.
std::optional<model::Experts> experts_of_new_run(const run::RunConfig& config, bool on_gpu);

struct Start {
  std::optional<run::RunDir> dir;  // rank 0 only
  run::Fingerprints fingerprints;  // rank 0 only
  std::optional<checkpoint::Checkpoint> from;
  graft::GraftedModel model;
  planning::MemoryPlan plan;
  std::vector<run::TrainedRow> trained;
};
// config with absolute paths; resume: as in train(). Without train.memory_budget_gib a GPU's plan is for what it has
// free here, before anything is loaded: with several processes for the least that one of them has, since layers that
// run again hold collectives. A resumed run may find another value: which layers run again changes no bit. With several
// processes rank 0 makes a new run by itself (initialisations see the whole base) and saves it as step 0; then all load
// that, as they load any other checkpoint: whatever the layout.
Start start_run(const run::RunConfig& config, const std::string& resume, const distributed::Mesh& mesh,
                bool accept_data = false);

}  // namespace moegraft::train
