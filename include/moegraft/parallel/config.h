#pragma once
// The `parallel` section of a run.

#include "moegraft/config/config.h"

namespace moegraft::parallel {

struct ParallelConfig {
  int64_t expert = 1;
  bool shard_base = false, shard_optimizer = false;
  double timeout_seconds = 600, startup_minutes = 60;
  double bucket_mib = 25;
  bool numa = true;  // of the process: `moegraft train` asks it at the start
  template <class V>
  void visit_fields(V& v) {
    v("expert", expert, config::range(1, 4096),
      "Processes that the experts are spread over; must divide the number of processes and of experts. The others "
      "repeat them on other data.");
    v("shard_base", shard_base, config::any(),
      "Split the frozen experts over the processes that hold the same ones and gather them layer by layer; every layer "
      "is then computed again in the backward pass.");
    v("shard_optimizer", shard_optimizer, config::any(),
      "Split the optimizer's state over the processes that hold the same parameters.");
    v("timeout_seconds", timeout_seconds, config::range(1.0, 1e6),
      "How long a process waits for the others, at the start and in one exchange.");
    v("startup_minutes", startup_minutes, config::range(0.1, 1e5),
      "How long the others wait for the first process to initialise a new run.");
    v("bucket_mib", bucket_mib, config::range(0.01, 1e5), "Gradients that are summed over the processes at a time.");
    v("numa", numa, config::any(),
      "On a machine with several NUMA nodes and no GPU: keep each process to its share of the nodes, and spread the "
      "memory of one that has several.");
  }
};

}  // namespace moegraft::parallel
