// What a line of metrics.jsonl says of a window of steps.
#include "train/step_metrics.h"

#include <gtest/gtest.h>

namespace moegraft::train {
namespace {

StepResult step(std::vector<double> nll_M, std::vector<int64_t> labels_M, int64_t tokens, double seconds,
                double wait_seconds) {
  StepResult r;
  r.nll_M = std::move(nll_M), r.labels_M = std::move(labels_M), r.tokens = tokens, r.seconds = seconds,
  r.wait_seconds = wait_seconds;
  return r;
}

TEST(StepMetrics, AWindowHoldsTheStepsSinceTheLineBefore) {
  model::ParameterRegistry registry;
  DistributedStep alone({}, distributed::make_mesh(distributed::World::join({}), 1), registry);
  StepMetrics metrics({"text", "image"}, 10);
  metrics.begin(100.0);
  metrics.add(step({6.0, 0.0}, {2, 0}, 30, 1.0, 0.25));
  metrics.add(step({4.0, 0.0}, {3, 0}, 50, 3.0, 0.75));
  run::TrainingLine line;
  line.step = 2, line.seconds = 104.0;
  metrics.end_window(line, alone);
  EXPECT_EQ(line.nll, (std::map<std::string, double>{{"text", 2.0}})) << "no label of an image";
  EXPECT_EQ(line.tokens_per_s, 20.0);
  EXPECT_EQ(line.data_wait_share, 0.25);
  EXPECT_FALSE(line.busy_seconds_by_rank || line.comm_wait_share || line.comm_mib_per_step)
      << "there are no other processes";

  metrics.add(step({1.0, 9.0}, {1, 3}, 10, 2.0, 1.0));
  run::TrainingLine next;
  next.step = 3, next.seconds = 106.0;
  metrics.end_window(next, alone);
  EXPECT_EQ(next.nll, (std::map<std::string, double>{{"text", 1.0}, {"image", 3.0}}));
  EXPECT_EQ(next.tokens_per_s, 5.0) << "since the line before, not since the beginning";
  EXPECT_EQ(next.data_wait_share, 0.5);
}

}  // namespace
}  // namespace moegraft::train
