#pragma once
// Checkpoints as atomic directories. One process writes <root>/step-00000100/{adapter.safetensors,
// optimizer.safetensors, state.json, manifest.json}; W processes write adapter-00000-of-0000W.safetensors and
// optimizer-… each, with whole tensors and row slices, and one state.json and manifest.json. The manifest, written
// last, holds the size and checksum of every other file, and which rows of which tensor a slice is. All is written
// under a temporary name, fsynced and renamed, so a directory called step-… is whole unless its files were damaged
// later, and then its checksums say so.

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "moegraft/checkpoint/config.h"
#include "moegraft/checkpoint/parts.h"
#include "moegraft/checkpoint/peers.h"
#include "moegraft/io/safetensors.h"

namespace moegraft::checkpoint {

struct Checkpoint {
  std::filesystem::path dir;
  int64_t step = 0;
  std::optional<double> measure;        // the evaluation measure it was saved with
  io::TensorMap parameters, optimizer;  // whole tensors, whatever layout wrote them. Mapped (valid even after the
                                        // directory is removed) unless put together from slices
  std::string state;                    // what save() was given (see checkpoint/state.h)
};

// Writes checkpoints below `root` and removes old ones: one writer per root at a time (the run's lock sees to it), or
// one in each process of a world. Then `root` lies on a file system that all of them see, every rank makes the same
// calls in the same order, and all but the parts is rank 0's: only it removes anything, its state and measure are
// saved.
class CheckpointWriter {
 public:
  // Makes the folder and removes what an interrupted writer left behind (rank 0; the others' first write waits for it).
  CheckpointWriter(std::filesystem::path root, CheckpointConfig config, bool lower_is_better = true,
                   std::shared_ptr<distributed::World> world = nullptr);
  CheckpointWriter(std::filesystem::path root, CheckpointConfig config, bool lower_is_better, Peers peers);
  // Ends what is under way, waiting a few seconds at most for the other ranks; logs its error.
  ~CheckpointWriter();
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;

  // Saves this rank's parts (of each tensor every row by exactly one rank: parts_to_write) and returns the new
  // directory. With config.async it copies the tensors to host memory (on CUDA: queues the copies on the current stream
  // and waits for nothing), returns, and the directory appears when it is whole; at most one save is under way: the
  // next one, wait() or set_aside_after() first ends it and throws its error. Without, all is done on return. A
  // checkpoint of the same step is replaced. Afterwards only the newest `keep` stay, and the best measured one with
  // keep_best. UserError on every rank when it cannot be written (a full disk, a rank that died): the earlier ones are
  // untouched and nothing half-written stays.
  std::filesystem::path save(int64_t step, const Parts& parameters, const Parts& optimizer, const std::string& state,
                             std::optional<double> measure = {});
  void wait();  // ends the save under way and throws its error

  // Renames checkpoints newer than `step` to damaged-step-…: they are no longer listed, counted or removed.
  void set_aside_after(int64_t step);

  double last_stall_seconds() const;  // how long the last save() kept its caller
  double last_write_seconds() const;  // of the last finished save, from its start to the published directory
  int64_t last_bytes() const;         // of tensors that this rank wrote in the last save()
  int64_t buffer_bytes() const;       // host memory kept for the copies

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

std::string step_name(int64_t step);  // "step-00000100"

// Directories named step-…, oldest first, not verified. Empty when `root` does not exist.
std::vector<std::filesystem::path> list_checkpoints(const std::filesystem::path& root);

// Why the directory is not a whole checkpoint ("adapter.safetensors: checksum differs"), or empty when it is.
std::string find_damage(const std::filesystem::path& dir);

// The newest undamaged checkpoint; damaged ones are named in a warning and passed over. None when there is no
// checkpoint. UserError when all are damaged.
std::optional<std::filesystem::path> find_latest(const std::filesystem::path& root);

// The undamaged checkpoint with the best measure (the earliest of equals); none when nothing was measured.
std::optional<std::filesystem::path> find_best(const std::filesystem::path& root, bool lower_is_better = true);

// Verifies and reads one. UserError names the directory and the damage.
Checkpoint load(const std::filesystem::path& dir);

}  // namespace moegraft::checkpoint
