#pragma once
// What training wrote into metrics.jsonl.

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "moegraft/io/json.h"

namespace moegraft::testing {

// A column of a run's training lines, by step.
inline std::map<int64_t, double> training_column(const std::filesystem::path& run, const char* key) {
  std::map<int64_t, double> out;
  std::ifstream in(run / "metrics.jsonl");
  for (std::string line; std::getline(in, line);)
    if (const io::Json j = io::Json::parse(line); j.contains("loss")) out[j.at("step")] = j.at(key);
  return out;
}

// Its losses, in the order of the steps.
inline std::vector<double> training_losses(const std::filesystem::path& run) {
  std::vector<double> out;
  for (const auto& [step, loss] : training_column(run, "loss")) out.push_back(loss);
  return out;
}

}  // namespace moegraft::testing
