#pragma once
// What training wrote into metrics.jsonl.

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "moegraft/run/records.h"

namespace moegraft::testing {

inline run::Metrics metrics_of(const std::filesystem::path& run) { return run::read_metrics(run / "metrics.jsonl"); }

// A measure of a run's training lines, by step.
inline std::map<int64_t, double> training_column(const std::filesystem::path& run, const char* key) {
  std::map<int64_t, double> out;
  for (const auto& line : metrics_of(run).training) out[line.step] = run::measures(line).at(key);
  return out;
}

// Its losses, in the order of the steps.
inline std::vector<double> training_losses(const std::filesystem::path& run) {
  std::vector<double> out;
  for (const auto& [step, loss] : training_column(run, "loss")) out.push_back(loss);
  return out;
}

}  // namespace moegraft::testing
