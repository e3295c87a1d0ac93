#pragma once
// The whole YAML of a run. Sections live beside their owners, <module>/config.h; this file only puts them together.

#include <map>
#include <string>
#include <vector>

#include "moegraft/adapters/config.h"
#include "moegraft/checkpoint/config.h"
#include "moegraft/config/config.h"
#include "moegraft/data/config.h"
#include "moegraft/graft/config.h"
#include "moegraft/model/config.h"
#include "moegraft/ot/config.h"
#include "moegraft/parallel/config.h"
#include "moegraft/routing/config.h"
#include "moegraft/train/config.h"

namespace moegraft::run {

struct RunSection {
  std::string dir;
  int64_t seed = 17;
  template <class V>
  void visit_fields(V& v) {
    v("dir", dir, config::required(config::path()), "The run directory.");
    v("seed", seed, config::range(0, 9e15), "Seed of everything random.");
  }
};

struct RunConfig {
  RunSection run;
  model::ModelConfig model;
  std::map<std::string, graft::ModalityConfig> modalities;
  std::vector<adapters::AdapterConfig> adapters;
  graft::EmbeddingConfig embeddings;
  ot::OtConfig ot;
  data::DataConfig data;
  train::TrainConfig train;
  routing::RoutingConfig routing;
  checkpoint::CheckpointConfig checkpoint;
  parallel::ParallelConfig parallel;
  template <class V>
  void visit_fields(V& v) {
    v("run", run, config::required(), "Where the run lives.");
    v("model", model, config::required(), "The base.");
    v("modalities", modalities, config::any(), "New modalities by name.");
    v("adapters", adapters, config::any(), "Adapters on the frozen base.");
    v("embeddings", embeddings, config::any(), "The new rows.");
    v("ot", ot, config::any(), "Gromov-Wasserstein settings of the initialisations.");
    v("data", data, config::any(), "Data.");
    v("train", train, config::any(), "The loop.");
    v("routing", routing, config::any(), "Routing statistics.");
    v("checkpoint", checkpoint, config::any(), "Checkpoints.");
    v("parallel", parallel, config::any(), "Several processes: torchrun, srun, mpirun or `moegraft launch`.");
  }
  void validate(const std::string& path) const;  // cross-field rules
  static std::vector<config::MovedKey> moved_keys();
};

}  // namespace moegraft::run
