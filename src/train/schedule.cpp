#include "moegraft/train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace moegraft::train {

double warmup_factor(int64_t step, int64_t warmup) { return step < warmup ? double(step + 1) / double(warmup) : 1.0; }

double decay_factor(ScheduleKind kind, double progress, double min_ratio) {
  progress = std::min(1.0, progress);
  if (kind == ScheduleKind::constant) return 1.0;
  if (kind == ScheduleKind::linear) return 1.0 + (min_ratio - 1.0) * progress;
  return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + std::cos(std::numbers::pi * progress));
}

double Schedule::factor(int64_t step) const {
  if (step < warmup) return warmup_factor(step, warmup);
  const int64_t span = std::max<int64_t>(1, steps - 1 - warmup);
  return decay_factor(kind, double(step - warmup) / double(span), min_ratio);
}

}  // namespace moegraft::train
