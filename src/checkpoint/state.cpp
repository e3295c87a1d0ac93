#include "moegraft/checkpoint/state.h"

#include "moegraft/base/check.h"
#include "moegraft/io/json.h"

namespace moegraft::checkpoint {

std::string to_json(const TrainState& state) {
  io::Json j = {{"step", state.step},
                {"seed", state.seed},
                {"tokens_seen", state.tokens_seen},
                {"data_cursor", state.data_cursor},
                {"seconds", state.seconds},
                {"lr_factor", state.lr_factor},
                {"last_loss", state.last_loss},
                {"best_measure", nullptr},
                {"best_step", state.best_step},
                {"environment", state.environment},
                {"fingerprints", state.fingerprints}};
  if (state.best_measure) j["best_measure"] = *state.best_measure;
  return j.dump(2) + "\n";
}

TrainState state_from_json(const std::string& text) {
  try {
    const auto j = io::Json::parse(text);
    TrainState state;
    j.at("step").get_to(state.step);
    j.at("seed").get_to(state.seed);
    j.at("tokens_seen").get_to(state.tokens_seen);
    j.at("data_cursor").get_to(state.data_cursor);
    j.at("seconds").get_to(state.seconds);
    state.lr_factor = j.value("lr_factor", -1.0);
    state.last_loss = j.value("last_loss", 0.0);
    if (!j.at("best_measure").is_null()) state.best_measure = j.at("best_measure").get<double>();
    j.at("best_step").get_to(state.best_step);
    j.at("environment").get_to(state.environment);
    if (j.contains("fingerprints")) j["fingerprints"].get_to(state.fingerprints);
    return state;
  } catch (const io::Json::exception& e) {
    fail<UserError>("state.json of the checkpoint does not read as a training state: ", e.what());
  }
}

std::vector<std::string> environment_differences(const std::map<std::string, std::string>& before,
                                                 const std::map<std::string, std::string>& now) {
  std::vector<std::string> lines;
  for (const auto& [key, value] : now) {
    const auto was = before.find(key);
    if (was == before.end())
      lines.push_back(key + " was not recorded, is " + value);
    else if (was->second != value)
      lines.push_back(key + " was " + was->second + ", is " + value);
  }
  for (const auto& [key, value] : before)
    if (!now.contains(key)) lines.push_back(key + " was " + value + ", is unknown");
  return lines;
}

}  // namespace moegraft::checkpoint
