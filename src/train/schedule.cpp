#include "moegraft/train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace moegraft::train {

double Schedule::factor(int64_t step) const {
  if (step < warmup) return double(step + 1) / double(warmup);
  if (kind == ScheduleKind::constant) return 1.0;
  const int64_t span = std::max<int64_t>(1, steps - 1 - warmup);
  const double progress = std::min(1.0, double(step - warmup) / double(span));
  if (kind == ScheduleKind::linear) return 1.0 + (min_ratio - 1.0) * progress;
  return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + std::cos(std::numbers::pi * progress));
}

}  // namespace moegraft::train
