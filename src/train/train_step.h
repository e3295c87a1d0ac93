#pragma once
// One optimizer step: a batch, forward and backward passes, the exchange with the other processes, the update.

#include <array>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "moegraft/model/decoder.h"
#include "moegraft/model/prefix_cache.h"
#include "moegraft/routing/stats.h"
#include "session.h"
#include "stage.h"

namespace moegraft::train {

// Numbers are over all processes and equal in each, unless said otherwise.
struct StepResult {
  double loss = 0, grad_norm = 0;
  std::vector<double> nll_M;  // sums by modality, text first
  std::vector<int64_t> labels_M;
  int64_t tokens = 0;
  bool stop = false, time_is_up = false;  // a process was asked to end, or its time is up: all leave after this step
  std::set<std::string> idle_groups;      // no tensor has a gradient: looked for in a process alone, where asked for
  // Of this process.
  double seconds = 0, wait_seconds = 0;                 // of the step; of that waiting for its batch
  std::map<std::string, distributed::Traffic> traffic;  // DistributedStep::take_traffic
};

// Owns what is kept from step to step without being part of a checkpoint: the prefix cache and the routing statistics.
// The stage outlives it.
class TrainStep {
 public:
  TrainStep(Stage& stage, const run::RunConfig& config, int64_t recompute_layers);

  // Collective. session: which step it is, and whether this process was asked to stop; counting the step is the
  // caller's. UserError when the loss or the gradients' norm is not finite: the batch is saved in the run's directory
  // first.
  StepResult run(const Session& session, bool look_for_idle_groups);

  // Of all processes, since the last call. Collective.
  routing::RoutingReport take_routing();
  model::PrefixCache::Use take_prefix_use() { return prefix_cache_.take_use(); }

 private:
  struct Numbers {
    std::vector<double> losses;                 // of each micro-batch
    std::vector<std::vector<double>> nll_sums;  // its sums by modality
    std::array<double, 2> grad_squares{};       // of what is on a device
  };
  static Numbers read_numbers(const std::vector<model::LossResult>& results, const at::Tensor& squares_2);

  data::StepBatch next_batch(StepResult& out);
  std::vector<model::LossResult> run_batches(const data::StepBatch& step);
  std::set<std::string> idle_groups() const;
  void share_numbers(const Session& session, const std::vector<model::PackedBatch>& batches,
                     const std::vector<model::LossResult>& results, const Numbers& numbers, bool stop, StepResult& out);
  [[noreturn]] void stop_on_bad_number(const Session& session, const model::PackedBatch* batch, const char* what,
                                       double value) const;

  Stage& stage_;
  double clip_;
  bool balances_;  // with the auxiliary loss
  routing::RoutingStats routing_;
  model::PrefixCache prefix_cache_;
  model::ForwardOptions forward_;
};

}  // namespace moegraft::train
