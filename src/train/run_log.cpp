#include "run_log.h"

namespace moegraft::train {

void RunLog::routing(const routing::RoutingReport& report, int64_t step) {
  if (!dir_) return;
  dir_->routing.append(routing::to_json_line(report, step));
  for (const auto& [tag, value] : routing::scalars(report)) board_->scalar(tag, step, value);
}

}  // namespace moegraft::train
