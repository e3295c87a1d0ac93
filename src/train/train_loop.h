#pragma once
// What happens when: the steps of one stage, and between them evaluations, samples, lines of the run log and
// checkpoints.

#include <optional>
#include <vector>

#include "health.h"
#include "moegraft/run/run_config.h"
#include "moegraft/train/trainer.h"
#include "session.h"
#include "stage.h"
#include "step_metrics.h"
#include "train_step.h"

namespace moegraft::train {

// Runs a stage within a session, both of which outlive it, as does the config. Owns only what may be forgotten with it:
// caches, sums for the next line, and what the checks of health.h have seen.
class TrainLoop {
 public:
  TrainLoop(const run::RunConfig& config, Stage& stage, Session& session, int64_t recompute_layers);

  // To the stage's end, or to a polite stop. Collective: every process leaves after the same step.
  TrainOutcome run();

 private:
  bool ended_early() const;
  void step();
  void log_metrics();
  void log_routing(bool last);
  void log_evaluation();
  void draw_samples();
  void save();
  void check_start();
  void check_step(bool last);
  void act_on(const std::vector<Finding>& findings);

  const run::RunConfig& config_;
  Stage& stage_;
  Session& session_;
  TrainStep train_step_;
  StepMetrics metrics_;
  Health health_;  // what it looks at is equal on every rank, and so is what it ends
  StepResult last_;
  std::optional<double>
      measure_;  // of the evaluation after the last step that was dealt with; none where there was none
};

}  // namespace moegraft::train
