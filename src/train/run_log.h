#pragma once
// What a run writes down while it trains: metrics.jsonl, routing.jsonl, TensorBoard, notes in run.json. One process
// writes; in the others every call does nothing.

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "moegraft/routing/stats.h"
#include "moegraft/run/run_dir.h"
#include "moegraft/run/tensorboard.h"

namespace moegraft::train {

// Owns the run's directory, with its lock: it outlives everything that writes there.
class RunLog {
 public:
  // dir: none in a process that does not write. resume_step: as in TensorBoard.
  RunLog(std::optional<run::RunDir> dir, int64_t resume_step) : dir_(std::move(dir)) {
    if (dir_) board_ = std::make_unique<run::TensorBoard>(dir_->tensorboard(), resume_step);
  }
  bool writes() const { return dir_.has_value(); }

  // A line of JSON, from records.h.
  void metrics(const std::string& line) {
    if (dir_) dir_->metrics.append(line);
  }
  void scalar(const std::string& tag, int64_t step, double value) {
    if (board_) board_->scalar(tag, step, value);
  }
  void image_file(const std::string& tag, int64_t step, const std::filesystem::path& png) {
    if (board_) board_->image_file(tag, step, png);
  }
  void note_trainable(const std::vector<run::TrainedRow>& rows) {
    if (dir_) dir_->note_trainable(rows);
  }
  void note_warning(const run::Warning& warning) {
    if (dir_) dir_->note_warning(warning);
  }
  void routing(const routing::RoutingReport& report, int64_t step);
  // Before a checkpoint: a resume keeps the lines up to its step.
  void sync() {
    if (!dir_) return;
    dir_->metrics.sync();
    dir_->routing.sync();
  }

 private:
  std::optional<run::RunDir> dir_;
  std::unique_ptr<run::TensorBoard> board_;
};

}  // namespace moegraft::train
