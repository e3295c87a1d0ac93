#pragma once
// A folder that is written beside its final place and appears there whole, or not at all.

#include <filesystem>

namespace moegraft::io {

class StagedFolder {
 public:
  // Makes ".NAME.part-PID" beside `target`, and the folders above it; removes such folders of processes that were killed. UserError when it cannot.
  explicit StagedFolder(std::filesystem::path target);
  ~StagedFolder();  // without publish(): removes what was written
  StagedFolder(const StagedFolder&) = delete;
  StagedFolder& operator=(const StagedFolder&) = delete;

  const std::filesystem::path& path() const { return staged_; }
  const std::filesystem::path& target() const { return target_; }
  // Puts the folder in its place; what is there is exchanged for it, then removed: whether it may be is the caller's to decide. UserError: the old one stays.
  void publish();

 private:
  std::filesystem::path target_, staged_;
  int lock_ = -1;
};

}  // namespace moegraft::io
