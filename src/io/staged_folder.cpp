#include "moegraft/io/staged_folder.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "moegraft/base/check.h"
#include "moegraft/io/files.h"

namespace moegraft::io {

namespace fs = std::filesystem;

namespace {

constexpr const char* kOld = ".old";  // what publish() moved aside: with its process gone, the last that there is

constexpr int kMostLinks = 40;  // as the kernel

// A link stands for what it names, whether that is there or not.
fs::path follow_links(fs::path path) {
  std::error_code error;
  if (!fs::is_symlink(path, error)) return path;
  for (int links = 0; fs::is_symlink(path, error); ++links) {
    MOEGRAFT_CHECK(links < kMostLinks, path.string(),
                   " is a link that leads to itself; remove it or name another folder");
    path = path.parent_path() / fs::read_symlink(path, error);
    if (!path.has_filename()) path = path.parent_path();
  }
  const fs::path whole = fs::weakly_canonical(path, error);
  return error ? path : whole;
}

// A process stays in a folder that is replaced under it, and sees nothing more of that name.
bool holds_current_directory(const fs::path& folder) {
  std::error_code error;
  const fs::path whole = fs::canonical(folder, error), here = error ? fs::path() : fs::current_path(error);
  return !error && std::mismatch(whole.begin(), whole.end(), here.begin(), here.end()).first == whole.end();
}

// Of the names of a folder's parts: ours end in the number of a process.
bool is_staged_name(const std::string& name, const std::string& prefix) {
  const std::string number = name.starts_with(prefix) ? name.substr(prefix.size()) : "";
  return !number.empty() && number[0] != '0' && number.find_first_not_of("0123456789") == std::string::npos;
}

// The lock that a process holds on what it stages ends with the process, however that ends; -1: another holds it, or
// this file system has none for folders.
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
    if (!is_staged_name(name, prefix) || fs::exists(entry.path().string() + kOld) || !entry.is_directory(error))
      continue;
    const int fd = lock(entry.path());
    if (fd < 0) continue;
    fs::remove_all(entry.path(), error);
    ::close(fd);
  }
}

}  // namespace

StagedFolder::StagedFolder(fs::path target) : target_(fs::absolute(target).lexically_normal()) {
  if (!target_.has_filename()) target_ = target_.parent_path();  // "dir/"
  target_ = follow_links(target_);
  MOEGRAFT_CHECK_USAGE(
      !holds_current_directory(target_), target_.string(),
      " is the current directory or holds it, and would be replaced as a whole; name a folder of its own, such as ",
      (target_ / "NAME").string());
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

void StagedFolder::publish(const std::function<void()>& check_replace) {
  for (const auto& entry : fs::recursive_directory_iterator(staged_))
    if (entry.is_directory()) sync_directory(entry.path());
  sync_directory(staged_);
  // rename() takes the place of an empty folder, and of nothing else.
  if (::rename(staged_.c_str(), target_.c_str()) == 0) return sync_directory(target_.parent_path());
  const int reason = errno;
  const bool taken = reason == EEXIST || reason == ENOTEMPTY || reason == ENOTDIR;
  MOEGRAFT_CHECK(taken, "cannot put ", target_.string(), " in place: ", std::strerror(reason));
  MOEGRAFT_CHECK(check_replace, target_.string(),
                 " has been made by something else in the meantime, and is left as it is: name another folder, or "
                 "remove it first");
  check_replace();
  if (::renameat2(AT_FDCWD, staged_.c_str(), AT_FDCWD, target_.c_str(), RENAME_EXCHANGE) != 0) {
    // File systems without this flag (some network ones): two steps, the first of which is undone when the second
    // fails.
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

std::string find_foreign(const fs::path& folder, const std::vector<std::string>& ours) {
  for (const auto& entry : fs::directory_iterator(folder))
    if (const std::string name = entry.path().filename().string();
        std::find(ours.begin(), ours.end(), name) == ours.end())
      return name;
  return {};
}

}  // namespace moegraft::io
