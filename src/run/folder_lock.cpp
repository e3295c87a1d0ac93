#include "moegraft/run/folder_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/text.h"
#include "moegraft/io/files.h"

namespace moegraft::run {

std::string host_name() {
  char name[256] = {};
  return gethostname(name, sizeof name - 1) == 0 ? name : "unknown";
}

FolderLock::FolderLock(const std::filesystem::path& folder, const std::string& what, const std::string& remedy) {
  const auto path = folder / "lock";
  fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
  MOEGRAFT_CHECK(fd_ >= 0 || errno != ELOOP, path.string(), " is a symbolic link; remove it");
  MOEGRAFT_CHECK(fd_ >= 0, "cannot open ", path.string(), ": ", std::strerror(errno));
  if (::flock(fd_, LOCK_EX | LOCK_NB) != 0) {
    const int reason = errno;
    ::close(std::exchange(fd_, -1));
    MOEGRAFT_CHECK(reason == EWOULDBLOCK, "cannot lock ", path.string(), ": ", std::strerror(reason));
    fail<UserError>("the ", what, " ", folder.string(), " is in use by process ", trim(io::read_file(path)), ": ",
                    remedy);
  }
  const std::string owner = std::to_string(getpid()) + " on " + host_name() + "\n";
  if (::ftruncate(fd_, 0) != 0 || ::pwrite(fd_, owner.data(), owner.size(), 0) < 0)
    log::warning("cannot note the process in ", path.string(), ": ", std::strerror(errno));  // the lock itself holds
}

FolderLock::~FolderLock() {
  if (fd_ >= 0) ::close(fd_);
}

FolderLock::FolderLock(FolderLock&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}

}  // namespace moegraft::run
