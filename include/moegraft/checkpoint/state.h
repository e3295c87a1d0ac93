#pragma once
// What a training run must know besides tensors to continue exactly: state.json of a checkpoint.

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace moegraft::checkpoint {

struct TrainState {
  int64_t step = 0;  // optimizer steps done
  int64_t seed = 0;  // random numbers are counter-based by (seed, step, purpose): no generator state
  int64_t tokens_seen = 0;
  std::string data_cursor;               // as the data module writes it
  double seconds = 0;                    // training time so far, over all sessions
  double lr_factor = -1, last_loss = 0;  // of the last step; -1: none, or not recorded
  std::optional<double> best_measure;
  int64_t best_step = -1;
  std::map<std::string, std::string> environment;  // what bit-identity depends on: binary, processor, threads, layout
  std::map<std::string, std::string>
      fingerprints;  // what it was trained from, as run.json names it: a checkpoint may leave its run
};

std::string to_json(const TrainState& state);
TrainState state_from_json(const std::string& text);  // UserError names a missing or mistyped key

// One line for each entry that differs: "threads was 2, is 4". Empty when a resumed run is bit-identical.
std::vector<std::string> environment_differences(const std::map<std::string, std::string>& before,
                                                 const std::map<std::string, std::string>& now);

}  // namespace moegraft::checkpoint
