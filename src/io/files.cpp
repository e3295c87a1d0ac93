#include "moegraft/io/files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstring>

#include "atomic_file.h"
#include "moegraft/base/check.h"

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
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
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

// XXH64 (Collet, "xxHash fast digest algorithm", seed 0): about memory speed, and stable across versions because it is a published format.
class Xxh64 {
 public:
  void update(const char* data, size_t bytes) {
    total_ += bytes;
    if (used_ > 0) {
      const size_t take = std::min(bytes, kStripe - used_);
      std::memcpy(buffer_.data() + used_, data, take);
      used_ += take, data += take, bytes -= take;
      if (used_ < kStripe) return;
      stripe(buffer_.data());
      used_ = 0;
    }
    for (; bytes >= kStripe; data += kStripe, bytes -= kStripe) stripe(data);
    std::memcpy(buffer_.data(), data, bytes);
    used_ = bytes;
  }

  uint64_t digest() const {
    uint64_t h = kP5;
    if (total_ >= kStripe) {
      h = std::rotl(lane_[0], 1) + std::rotl(lane_[1], 7) + std::rotl(lane_[2], 12) + std::rotl(lane_[3], 18);
      for (const uint64_t lane : lane_) h = (h ^ round(0, lane)) * kP1 + kP4;
    }
    h += total_;
    const char* at = buffer_.data();
    size_t left = used_;
    for (; left >= 8; at += 8, left -= 8) h = std::rotl(h ^ round(0, load<uint64_t>(at)), 27) * kP1 + kP4;
    if (left >= 4) {
      h = std::rotl(h ^ (load<uint32_t>(at) * kP1), 23) * kP2 + kP3;
      at += 4, left -= 4;
    }
    for (; left > 0; ++at, --left) h = std::rotl(h ^ (load<uint8_t>(at) * kP5), 11) * kP1;
    h = (h ^ (h >> 33)) * kP2;
    h = (h ^ (h >> 29)) * kP3;
    return h ^ (h >> 32);
  }

 private:
  static constexpr uint64_t kP1 = 0x9E3779B185EBCA87ULL, kP2 = 0xC2B2AE3D27D4EB4FULL, kP3 = 0x165667B19E3779F9ULL, kP4 = 0x85EBCA77C2B2AE63ULL,
                            kP5 = 0x27D4EB2F165667C5ULL;
  static constexpr size_t kStripe = 32;

  template <class T>
  static uint64_t load(const char* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  static uint64_t round(uint64_t lane, uint64_t input) { return std::rotl(lane + input * kP2, 31) * kP1; }
  void stripe(const char* at) {
    for (size_t i = 0; i < 4; ++i) lane_[i] = round(lane_[i], load<uint64_t>(at + 8 * i));
  }

  std::array<uint64_t, 4> lane_{kP1 + kP2, kP2, 0, 0 - kP1};
  std::array<char, kStripe> buffer_{};
  size_t used_ = 0;
  uint64_t total_ = 0;
};

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
  fail("cannot ", what, " ", path_.string(), ": ", reason(error), error == ENOSPC ? " (free some space; what was there before is kept)" : "");
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
  struct stat info {};
  if (::fstat(file.fd, &info) != 0) fail("cannot read ", path.string(), ": ", reason(errno));
  MOEGRAFT_CHECK(!S_ISDIR(info.st_mode), "cannot read ", path.string(), ": it is a directory, expected a file");
  // Pipes and /proc files report size 0: read until the end, and one byte beyond the size to notice it.
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
  uint64_t value = hash.digest();
  std::string hex(16, '0');
  for (size_t i = 16; i-- > 0; value >>= 4) hex[i] = "0123456789abcdef"[value & 15];
  return hex;
}

}  // namespace moegraft::io
