#pragma once
// What a line of metrics.jsonl says of the steps since the line before.

#include <cstdint>
#include <string>
#include <vector>

#include "moegraft/run/records.h"
#include "moegraft/train/distributed_step.h"
#include "train_step.h"

namespace moegraft::train {

// Sums over a window of steps, which every line ends.
class StepMetrics {
 public:
  // log_every: steps between lines; a warning of a straggler comes at most every 20 of them.
  StepMetrics(std::vector<std::string> modality_names, int64_t log_every)
      : names_(std::move(modality_names)), log_every_(log_every) {}

  // The first window begins after so many seconds of the run.
  void begin(double seconds) { window_.start = seconds; }
  void add(const StepResult& step);
  // Fills in what line says of the window that ends with it (line.step and line.seconds are set), and begins the next
  // one. With several processes collective: warns of one that is slower than the others.
  void end_window(run::TrainingLine& line, DistributedStep& distributed);

 private:
  // Of this process, but for the losses.
  struct Window {
    double start = 0;           // the run's seconds
    std::vector<double> nll_M;  // sums over all processes, text first
    std::vector<int64_t> labels_M;
    int64_t steps = 0, tokens = 0;
    double seconds = 0, wait_seconds = 0,
           exchange_seconds = 0;  // in steps; of that waiting for batches, and for other processes
    int64_t exchange_bytes = 0;   // handed to collectives
  };
  void compare_ranks(run::TrainingLine& line, DistributedStep& distributed);

  std::vector<std::string> names_;
  int64_t log_every_;
  Window window_;
  int64_t next_straggler_warning_ = 0;
};

}  // namespace moegraft::train
