#pragma once
// The learning rate as a factor of each group's peak. A pure function of the step: nothing to save, nothing to restore.

#include <cstdint>

#include "moegraft/train/config.h"

namespace moegraft::train {

// The two parts of a factor. Warm-up: (step + 1) / warmup before the step `warmup`, then 1. Decay: from 1 at progress 0
// to min_ratio at 1 and beyond (cosine, linear); constant stays at 1.
double warmup_factor(int64_t step, int64_t warmup);
double decay_factor(ScheduleKind kind, double progress, double min_ratio);

// A run's: the decay begins where the warm-up ends.
struct Schedule {
  ScheduleKind kind = ScheduleKind::cosine;
  int64_t warmup = 0;  // steps of linear warm-up: step s < warmup has the factor (s + 1) / warmup
  int64_t steps = 1;   // the last step, steps - 1, has the factor min_ratio (cosine, linear)
  double min_ratio = 0.0;

  // For the update number `step`, counted from 0. Steps past the end stay at min_ratio.
  double factor(int64_t step) const;
};

}  // namespace moegraft::train
