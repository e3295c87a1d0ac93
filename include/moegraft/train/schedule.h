#pragma once
// The learning rate as a factor of each group's peak. A pure function of the step: nothing to save, nothing to restore.

#include <cstdint>

#include "moegraft/train/config.h"

namespace moegraft::train {

struct Schedule {
  ScheduleKind kind = ScheduleKind::cosine;
  int64_t warmup = 0;  // steps of linear warm-up: step s < warmup has the factor (s + 1) / warmup
  int64_t steps = 1;   // the last step, steps - 1, has the factor min_ratio (cosine, linear)
  double min_ratio = 0.0;

  // For the update number `step`, counted from 0. Steps past the end stay at min_ratio.
  double factor(int64_t step) const;
};

}  // namespace moegraft::train
