#pragma once

#include <filesystem>
#include <string>

namespace moegraft::run {

std::string host_name();  // "unknown" where the system does not say

// One process at a time works in a folder: a lock on <folder>/lock, which names its owner. The system releases it when
// the process ends, however it ends.
class FolderLock {
 public:
  // UserError when another process has it: "the <what> <folder> is in use by process 12 on host: <remedy>"; and when
  // the file cannot be made.
  FolderLock(const std::filesystem::path& folder, const std::string& what, const std::string& remedy);
  ~FolderLock();
  FolderLock(FolderLock&& other) noexcept;
  FolderLock& operator=(FolderLock&&) = delete;

 private:
  int fd_ = -1;
};

}  // namespace moegraft::run
