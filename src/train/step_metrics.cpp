#include "step_metrics.h"

#include "libtorch.h"

#include <algorithm>

#include "moegraft/base/log.h"

namespace moegraft::train {

void StepMetrics::add(const StepResult& step) {
  Window& w = window_;
  w.nll_M.resize(step.nll_M.size(), 0.0);
  w.labels_M.resize(step.labels_M.size(), 0);
  for (size_t m = 0; m < step.nll_M.size(); ++m) w.nll_M[m] += step.nll_M[m], w.labels_M[m] += step.labels_M[m];
  w.tokens += step.tokens;
  w.wait_seconds += step.wait_seconds;
  w.seconds += step.seconds;
  for (const auto& [purpose, traffic] : step.traffic) {
    w.exchange_seconds += traffic.wait_seconds;
    w.exchange_bytes += traffic.bytes;
  }
  ++w.steps;
}

void StepMetrics::end_window(run::TrainingLine& line, DistributedStep& distributed) {
  const Window& w = window_;
  for (size_t m = 0; m < w.nll_M.size(); ++m)
    if (w.labels_M[m] > 0) line.nll[names_[m]] = w.nll_M[m] / double(w.labels_M[m]);
  line.tokens_per_s = double(w.tokens) / std::max(line.seconds - w.start, 1e-9);
  line.data_wait_share = w.seconds > 0 ? w.wait_seconds / w.seconds : 0;
  if (!distributed.alone()) compare_ranks(line, distributed);
  window_ = {};
  window_.start = line.seconds;
}

// What the exchange with the other processes takes, and whether one of them is slower: each one's step time without its
// waiting for the others.
void StepMetrics::compare_ranks(run::TrainingLine& line, DistributedStep& distributed) {
  const Window& w = window_;
  const double steps = double(std::max<int64_t>(w.steps, 1));
  const auto ranks = distributed.gather(
      {(w.seconds - w.exchange_seconds) / steps, w.exchange_seconds / steps, double(w.exchange_bytes) / steps},
      "step times");
  std::vector<double> busy;
  double wait = 0, bytes = 0;
  for (const auto& rank : ranks) busy.push_back(rank[0]), wait += rank[1], bytes += rank[2];
  line.busy_seconds_by_rank = busy;
  line.comm_wait_share = w.seconds > 0 ? wait / double(ranks.size()) / (w.seconds / steps) : 0;
  line.comm_mib_per_step = bytes / double(1 << 20);
  std::vector<double> sorted = busy;
  std::sort(sorted.begin(), sorted.end());
  const double median = sorted[(sorted.size() - 1) / 2], slowest = sorted.back();
  if (slowest > 1.5 * median && slowest - median > 0.02 && line.step >= next_straggler_warning_) {
    const auto rank = std::max_element(busy.begin(), busy.end()) - busy.begin();
    log::warning("rank ", rank, " is a straggler: ", slowest, " s of work a step, the median is ", median, " s");
    next_straggler_warning_ = line.step + 20 * log_every_;
  }
}

}  // namespace moegraft::train
