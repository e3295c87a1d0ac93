#pragma once
// The `checkpoint` section of a run.

#include "moegraft/config/config.h"

namespace moegraft::checkpoint {

struct CheckpointConfig {
  int64_t every = 100;
  int64_t keep = 3;
  bool keep_best = true;
  bool async = true;
  template <class V>
  void visit_fields(V& v) {
    v("every", every, config::range(1, 1e12),
      "Optimizer steps between checkpoints (one is always written at the end).");
    v("keep", keep, config::range(1, 1e6), "How many of the newest checkpoints to keep.");
    v("keep_best", keep_best, config::any(), "Also keep the checkpoint with the best evaluation measure.");
    v("async", async, config::any(), "Write in the background from a copy in host memory, while training goes on.");
  }
};

}  // namespace moegraft::checkpoint
