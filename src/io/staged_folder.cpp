#include "moegraft/io/staged_folder.h"

#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "moegraft/base/check.h"
#include "moegraft/io/files.h"

namespace moegraft::io {

namespace fs = std::filesystem;

StagedFolder::StagedFolder(fs::path target) : target_(fs::absolute(target).lexically_normal()) {
  if (!target_.has_filename()) target_ = target_.parent_path();  // "dir/"
  staged_ = target_.parent_path() / ("." + target_.filename().string() + ".part-" + std::to_string(::getpid()));
  std::error_code error;
  fs::create_directories(target_.parent_path(), error);
  if (!error) fs::remove_all(staged_, error);  // of a killed process with the same id
  if (!error) fs::create_directory(staged_, error);
  MOEGRAFT_CHECK(!error, "cannot make a folder in ", target_.parent_path().string(), ": ", error.message());
}

StagedFolder::~StagedFolder() {
  std::error_code ignored;
  fs::remove_all(staged_, ignored);  // after publish(): what was there before
}

void StagedFolder::publish() {
  for (const auto& entry : fs::recursive_directory_iterator(staged_))
    if (entry.is_directory()) sync_directory(entry.path());
  sync_directory(staged_);
  if (::renameat2(AT_FDCWD, staged_.c_str(), AT_FDCWD, target_.c_str(), RENAME_NOREPLACE) != 0 &&
      (errno != EEXIST || ::renameat2(AT_FDCWD, staged_.c_str(), AT_FDCWD, target_.c_str(), RENAME_EXCHANGE) != 0)) {
    // File systems without these flags (some network ones): two steps, the first of which is undone when the second fails.
    std::error_code error;
    const fs::path old = staged_.string() + ".old";
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
