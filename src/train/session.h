#pragma once
// One start of a run in one process: what lives while it trains, whatever it trains.

#include <filesystem>
#include <optional>
#include <string>
#include <utility>

#include "moegraft/base/clock.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/checkpoint/state.h"
#include "moegraft/distributed/world.h"
#include "moegraft/run/signals.h"
#include "run_log.h"
#include "startup.h"

namespace moegraft::train {

// Owns the run log (and with it the directory's lock), the checkpoint writer, the run's state (its step, tokens, time,
// best measure) and, from begin() on, the stop signals and the clock. Made after a Stage, so that what is wrong with
// its data shows before anything is written, and destroyed before it: a save under way is waited for while the other
// processes can still be reached.
class Session {
 public:
  // Takes start.dir. Goes on from start.from where there is one, and warns where the environment is another than its.
  Session(const run::RunConfig& config, Start& start, const distributed::Mesh& mesh);

  const std::filesystem::path& dir() const { return dir_; }
  RunLog& run_log() { return run_log_; }
  checkpoint::TrainState& state() { return state_; }
  const checkpoint::TrainState& state() const { return state_; }
  // Whether data.train is other data than the checkpoint was trained on (--accept-changed data).
  bool data_changed() const { return data_changed_; }
  // Checkpoints after the one that this session goes on from: once all of it has been taken.
  void set_aside_newer_checkpoints() { writer_.set_aside_after(state_.step); }

  // Training begins: signals no longer end the process but ask it to stop, and time counts.
  void begin();
  double seconds() const { return earlier_seconds_ + seconds_since(start_); }  // of training so far, over all sessions
  bool stepped() const { return state_.step > first_step_; }
  bool asked_to_stop() const { return signals_ && signals_->requested(); }  // this process
  std::string stopped_by() const;
  bool time_is_up() const { return max_minutes_ > 0 && seconds() > 60 * max_minutes_; }
  std::string status(double loss) const;  // for the progress bar

  // Saves the state and this process's parts, in the background where the config says so. measure: of the last
  // evaluation, lower is better.
  void save(const checkpoint::Parts& parameters, const checkpoint::Parts& optimizer, std::optional<double> measure);
  void finish_saving() { writer_.wait(); }
  // The share of the time since the save before that the last save took from training; none when there was none since
  // the last call.
  std::optional<double> take_stall_share() { return std::exchange(stall_share_, {}); }

 private:
  void restore(const checkpoint::Checkpoint& from);

  std::filesystem::path dir_;
  double max_minutes_;
  RunLog run_log_;  // holds the run directory's lock: beyond the writer's end
  checkpoint::CheckpointWriter writer_;
  checkpoint::TrainState state_;
  bool data_changed_ = false;
  std::optional<run::StopSignals> signals_;
  std::chrono::steady_clock::time_point start_;
  double earlier_seconds_ = 0;
  int64_t first_step_ = 0, first_tokens_ = 0;     // before this session
  std::optional<double> saved_at_, stall_share_;  // the run's seconds at the last save; not yet taken
};

}  // namespace moegraft::train
