#include "session.h"

#include "libtorch.h"

#include <algorithm>
#include <cstdio>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/progress.h"

namespace moegraft::train {
namespace {

checkpoint::Peers peers_of(const run::RunConfig& config, const distributed::Mesh& mesh) {
  if (!mesh.distributed()) return {};
  return checkpoint::peers_of(mesh.world, std::chrono::milliseconds(int64_t(1000 * config.parallel.timeout_seconds)));
}

}  // namespace

Session::Session(const run::RunConfig& config, Start& start, const distributed::Mesh& mesh)
    : dir_(config.run.dir),
      max_minutes_(config.train.max_minutes),
      run_log_(std::move(start.dir), start.from ? start.from->step : -1),
      writer_(dir_ / "checkpoints", config.checkpoint, true, peers_of(config, mesh)) {
  state_.seed = config.run.seed;
  state_.environment = run::describe_environment(start.model.device().str());
  state_.environment["layout"] =
      detail::concat("data ", mesh.data_size(), ", expert ", mesh.expert_size());  // what sums are grouped by
  state_.fingerprints = start.fingerprints;
  if (start.from) restore(*start.from);
  first_step_ = state_.step;
}

void Session::restore(const checkpoint::Checkpoint& from) {
  const auto environment = std::move(state_.environment), fingerprints = std::move(state_.fingerprints);
  state_ = checkpoint::state_from_json(from.state);
  if (state_.step > 0)
    for (const auto& line : checkpoint::environment_differences(state_.environment, environment))
      log::warning("resuming on another environment, so the result is not bit-identical to an uninterrupted run: ",
                   line);
  data_changed_ = std::any_of(fingerprints.begin(), fingerprints.end(), [&](const auto& now) {
    const auto was = state_.fingerprints.find(now.first);
    return now.first.starts_with("data.train") && was != state_.fingerprints.end() && was->second != now.second;
  });
  state_.environment = environment, state_.fingerprints = fingerprints;
}

void Session::begin() {
  signals_.emplace();
  start_ = std::chrono::steady_clock::now();
  earlier_seconds_ = state_.seconds;
  first_tokens_ = state_.tokens_seen;
}

std::string Session::stopped_by() const {
  return asked_to_stop() ? run::signal_name(signals_->received()) : "a signal to another process";
}

std::string Session::status(double loss) const {
  char buffer[96];
  const double rate = double(state_.tokens_seen - first_tokens_) / std::max(seconds_since(start_), 1e-9);
  std::snprintf(buffer, sizeof buffer, "loss %.4f · %s tok/s", loss, format_count(rate).c_str());
  return buffer;
}

void Session::save(const checkpoint::Parts& parameters, const checkpoint::Parts& optimizer,
                   std::optional<double> measure) {
  state_.seconds = seconds();
  run_log_.sync();
  writer_.save(state_.step, parameters, optimizer, checkpoint::to_json(state_), measure);
  const double now = seconds();
  if (saved_at_) stall_share_ = writer_.last_stall_seconds() / std::max(now - *saved_at_, 1e-9);
  saved_at_ = now;
}

}  // namespace moegraft::train
