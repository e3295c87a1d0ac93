#pragma once
// What one stage of a run trains, and with what.

#include <optional>
#include <string>
#include <vector>

#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/data/prefetch.h"
#include "moegraft/graft/grafted_model.h"
#include "moegraft/run/run_config.h"
#include "moegraft/train/distributed_step.h"
#include "moegraft/train/optimizer.h"
#include "moegraft/train/schedule.h"

namespace moegraft::train {

// Owns what a step changes beside the model (moments, the place in the data) and what it needs of the other processes.
// The model outlives it; its registry and which of its parameters train are fixed while it lives.
struct Stage {
  // Collective. Opens data.train and data.eval: UserError for shards that do not fit the model.
  Stage(const run::RunConfig& config, graft::GraftedModel& model, const distributed::Mesh& mesh);

  // Goes on from a checkpoint: its moments, then its place in the data; data_changed: from the beginning of data that
  // the place does not fit. UserErrors otherwise.
  void restore(const checkpoint::Checkpoint& from, const std::string& data_cursor, bool data_changed);

  graft::GraftedModel& model;
  std::vector<std::string> modality_names;  // text first; number m is modality m
  DistributedStep distributed;
  AdamW optimizer;
  Schedule schedule;
  data::PrefetchStream stream;
  std::optional<data::EvalStream> eval;
};

}  // namespace moegraft::train
