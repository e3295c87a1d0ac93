#include "moegraft/io/files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstring>

#include "atomic_file.h"
#include "moegraft/base/check.h"
#include "xxh64.h"

namespace moegraft::io {

namespace fs = std::filesystem;

namespace {

static_assert(std::endian::native == std::endian::little, "file formats here are little-endian");

// A descriptor that closes itself.
struct Descriptor {
  int fd = -1;
  explicit Descriptor(int value) : fd(value) {}
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
};

std::string reason(int error) { return std::strerror(error); }

int open_for_reading(const fs::path& path) {
  const int fd =
      ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe without a writer would block for ever
  if (fd < 0) fail("cannot read ", path.string(), ": ", reason(errno));
  return fd;
}

// Reads up to `bytes`, retrying interrupted and short reads; less only at the end of the file.
size_t read_some(int fd, char* into, size_t bytes, const fs::path& path) {
  size_t done = 0;
  while (done < bytes) {
    const ssize_t n = ::read(fd, into + done, bytes - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail("cannot read ", path.string(), ": ", reason(errno));
    if (n == 0) break;
    done += static_cast<size_t>(n);
  }
  return done;
}

void fsync_path(const fs::path& path, int flags) {
  const Descriptor file(::open(path.c_str(), flags | O_CLOEXEC));
  if (file.fd < 0 || ::fsync(file.fd) != 0) fail("cannot flush ", path.string(), " to disk: ", reason(errno));
}

}  // namespace

AtomicFile::AtomicFile(fs::path path) : path_(std::move(path)) {
  static std::atomic<uint64_t> counter{0};
  // O_EXCL: a leftover of a killed process with the same id is skipped, never written into.
  do {
    temporary_ = path_;
    temporary_ += ".tmp-" + std::to_string(::getpid()) + "-" + std::to_string(counter++);
    fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  } while (fd_ < 0 && errno == EEXIST);
  if (fd_ < 0) fail_errno("write");
}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) ::close(fd_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void AtomicFile::fail_errno(const char* what) const {
  const int error = errno;
  fail("cannot ", what, " ", path_.string(), ": ", reason(error),
       error == ENOSPC ? " (free some space; what was there before is kept)" : "");
}

void AtomicFile::write(const void* data, size_t bytes) {
  const char* at = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = ::write(fd_, at, std::min(bytes, size_t{1} << 30));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_errno("write");
    at += n, bytes -= static_cast<size_t>(n);
  }
}

void AtomicFile::commit() {
  if (::fsync(fd_) != 0) fail_errno("flush");
  const int closed = ::close(fd_);
  fd_ = -1;
  if (closed != 0) fail_errno("close");
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail_errno("replace");
  temporary_.clear();
  sync_directory(path_.parent_path());
}

std::string read_file(const fs::path& path) {
  const Descriptor file(open_for_reading(path));
  struct stat info{};
  if (::fstat(file.fd, &info) != 0) fail("cannot read ", path.string(), ": ", reason(errno));
  MOEGRAFT_CHECK(!S_ISDIR(info.st_mode), "cannot read ", path.string(), ": it is a directory, expected a file");
  MOEGRAFT_CHECK(S_ISREG(info.st_mode), "cannot read ", path.string(),
                 ": it is a pipe or a device, expected a regular file");
  // Files of /proc report size 0: read until the end, and one byte beyond the size to notice it.
  std::string bytes;
  size_t done = 0;
  for (size_t room = static_cast<size_t>(info.st_size) + 1;; room = std::max<size_t>(done, 1 << 16)) {
    bytes.resize(done + room);
    const size_t n = read_some(file.fd, bytes.data() + done, room, path);
    done += n;
    if (n < room) break;
  }
  bytes.resize(done);
  return bytes;
}

void write_file_atomic(const fs::path& path, std::string_view bytes) {
  AtomicFile file(path);
  file.write(bytes.data(), bytes.size());
  file.commit();
}

void sync_directory(const fs::path& dir) { fsync_path(dir.empty() ? fs::path(".") : dir, O_RDONLY | O_DIRECTORY); }
void sync_file(const fs::path& path) { fsync_path(path, O_RDONLY); }

uint64_t checksum_file(const fs::path& path) {
  const Descriptor file(open_for_reading(path));
  Xxh64 hash;
  std::string chunk(1 << 20, '\0');
  size_t n;
  do {
    n = read_some(file.fd, chunk.data(), chunk.size(), path);
    hash.update(chunk.data(), n);
  } while (n == chunk.size());
  return hash.digest();
}

std::string checksum_hex(std::string_view bytes) {
  Xxh64 hash;
  hash.update(bytes.data(), bytes.size());
  return hash.hex();
}

}  // namespace moegraft::io
