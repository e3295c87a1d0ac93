#pragma once
// Signs that a training learns nothing, or not what its config means. Each is said once; what they look at is on the
// host anyway and equal on every rank.

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "moegraft/routing/stats.h"

namespace moegraft::train {

struct Finding {
  int64_t step = 0;
  std::string check, text;
};

struct StartFacts {
  int64_t step = 0, steps = 0, warmup = 0, sequence_length = 0, max_positions = 0, trainable = 0;
  std::set<std::string> groups;
  std::map<std::string, double> learning_rates;  // of groups, those without parameters too
  // As shares of the peak: of the last step before a resume (-1: none), of the next one, and what the schedule of now
  // would have given that last step.
  double lr_before = -1, lr_now = 0, lr_was_now = 0;
};

struct StepFacts {
  int64_t step = 0;
  bool last = false;
  double loss = 0, grad_norm = 0;
  std::vector<int64_t> labels_M;      // of this step, text first
  std::set<std::string> idle_groups;  // no tensor has a gradient
};

class Health {
 public:
  Health(std::vector<std::string> modality_names, bool is_graft)
      : names_(std::move(modality_names)), is_graft_(is_graft), labels_M_(names_.size(), 0) {}

  std::vector<Finding> at_start(const StartFacts& facts);
  std::vector<Finding> after_step(const StepFacts& facts);
  std::vector<Finding> after_routing(const routing::RoutingReport& report, int64_t step,
                                     bool last);  // report: since the one before
  bool watches_groups() const { return steps_ < kFirstSteps; }

 private:
  static constexpr int64_t kFirstSteps = 10;  // of a session, within which things should have shown
  std::vector<Finding> once(int64_t step, std::vector<std::pair<const char*, std::string>> said);

  std::vector<std::string> names_;
  bool is_graft_;
  int64_t steps_ = 0, same_loss_ = 0, zero_gradients_ = 0;
  double last_loss_ = 0;
  std::vector<int64_t> labels_M_;
  std::map<std::string, int64_t> idle_;                                 // steps that a group had no gradient in
  std::map<int64_t, std::vector<std::vector<double>>> selections_LME_;  // layers with experts, by their number
  std::set<std::string> said_;
};

}  // namespace moegraft::train
