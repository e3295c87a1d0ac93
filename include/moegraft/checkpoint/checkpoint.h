#pragma once
// Checkpoints as atomic directories: <root>/step-00000100/{adapter.safetensors, optimizer.safetensors, state.json, manifest.json}.
// The manifest, written last, holds the size and checksum of every other file. All is written under a temporary name, fsynced and renamed, so
// a directory called step-… is whole unless its files were damaged later, and then its checksums say so.

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "moegraft/checkpoint/config.h"
#include "moegraft/io/safetensors.h"

namespace moegraft::checkpoint {

struct Checkpoint {
  std::filesystem::path dir;
  int64_t step = 0;
  std::optional<double> measure;  // the evaluation measure it was saved with
  io::TensorMap parameters, optimizer;  // mapped: valid even after the directory is removed
  std::string state;              // what save() was given (see checkpoint/state.h)
};

// Writes checkpoints below `root` and removes old ones. One writer per root at a time (the run's lock sees to it).
class CheckpointWriter {
 public:
  // Makes the folder and removes what an interrupted writer left behind.
  CheckpointWriter(std::filesystem::path root, CheckpointConfig config, bool lower_is_better = true);

  // Returns the new directory. A checkpoint of the same step is replaced. Afterwards only the newest `keep` stay, and the best measured one with
  // keep_best. UserError when it cannot be written (a full disk): the earlier ones are untouched and nothing half-written stays.
  std::filesystem::path save(int64_t step, const io::TensorMap& parameters, const io::TensorMap& optimizer, const std::string& state,
                             std::optional<double> measure = {});

  // Removes checkpoints newer than `step`: what an abandoned or damaged continuation left.
  void discard_after(int64_t step);

 private:
  void remove_old() const;
  std::filesystem::path root_;
  CheckpointConfig config_;
  bool lower_is_better_;
};

std::string step_name(int64_t step);  // "step-00000100"

// Directories named step-…, oldest first, not verified. Empty when `root` does not exist.
std::vector<std::filesystem::path> list_checkpoints(const std::filesystem::path& root);

// Why the directory is not a whole checkpoint ("adapter.safetensors: checksum differs"), or empty when it is.
std::string find_damage(const std::filesystem::path& dir);

// The newest undamaged checkpoint; damaged ones are named in a warning and passed over.
std::optional<std::filesystem::path> find_latest(const std::filesystem::path& root);

// The undamaged checkpoint with the best measure (the earliest of equals); none when nothing was measured.
std::optional<std::filesystem::path> find_best(const std::filesystem::path& root, bool lower_is_better = true);

// Verifies and reads one. UserError names the directory and the damage.
Checkpoint load(const std::filesystem::path& dir);

}  // namespace moegraft::checkpoint
