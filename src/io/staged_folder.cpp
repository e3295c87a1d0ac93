#include "moegraft/io/staged_folder.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "moegraft/base/check.h"
#include "moegraft/io/files.h"

namespace moegraft::io {

namespace fs = std::filesystem;

namespace {

constexpr const char* kOld = ".old";  // what publish() moved aside: with its process gone, the last that there is

// The lock that a process holds on what it stages ends with the process, however that ends; -1: another holds it, or this file system has none for folders.
int lock(const fs::path& folder) {
  const int fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0 || ::flock(fd, LOCK_EX | LOCK_NB) == 0) return fd;
  ::close(fd);
  return -1;
}

void remove_abandoned(const fs::path& parent, const std::string& prefix) {
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(parent, error)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(prefix) || name.ends_with(kOld) || fs::exists(entry.path().string() + kOld) || !entry.is_directory(error)) continue;
    const int fd = lock(entry.path());
    if (fd < 0) continue;
    fs::remove_all(entry.path(), error);
    ::close(fd);
  }
}

}  // namespace

StagedFolder::StagedFolder(fs::path target) : target_(fs::absolute(target).lexically_normal()) {
  if (!target_.has_filename()) target_ = target_.parent_path();  // "dir/"
  const std::string prefix = "." + target_.filename().string() + ".part-";
  staged_ = target_.parent_path() / (prefix + std::to_string(::getpid()));
  std::error_code error;
  fs::create_directories(target_.parent_path(), error);
  if (!error) remove_abandoned(target_.parent_path(), prefix);
  if (!error) fs::remove_all(staged_, error);  // of a killed process with the same id, where folders have no locks
  if (!error) fs::create_directory(staged_, error);
  MOEGRAFT_CHECK(!error, "cannot make a folder in ", target_.parent_path().string(), ": ", error.message());
  lock_ = lock(staged_);
}

StagedFolder::~StagedFolder() {
  std::error_code ignored;
  fs::remove_all(staged_, ignored);  // after publish(): what was there before
  if (lock_ >= 0) ::close(lock_);
}

void StagedFolder::publish() {
  for (const auto& entry : fs::recursive_directory_iterator(staged_))
    if (entry.is_directory()) sync_directory(entry.path());
  sync_directory(staged_);
  if (::renameat2(AT_FDCWD, staged_.c_str(), AT_FDCWD, target_.c_str(), RENAME_NOREPLACE) != 0 &&
      (errno != EEXIST || ::renameat2(AT_FDCWD, staged_.c_str(), AT_FDCWD, target_.c_str(), RENAME_EXCHANGE) != 0)) {
    // File systems without these flags (some network ones): two steps, the first of which is undone when the second fails.
    std::error_code error;
    const fs::path old = staged_.string() + kOld;
    const bool replace = fs::exists(target_);
    if (replace) fs::rename(target_, old, error);
    if (!error) fs::rename(staged_, target_, error);
    if (error && replace && fs::exists(old)) {
      std::error_code ignored;
      fs::rename(old, target_, ignored);
    }
    MOEGRAFT_CHECK(!error, "cannot put ", target_.string(), " in place: ", error.message());
    fs::remove_all(old, error);
  }
  sync_directory(target_.parent_path());
}

}  // namespace moegraft::io
