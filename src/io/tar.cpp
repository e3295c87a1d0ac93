#include "tar.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/text.h"

namespace moegraft::io {
namespace {

namespace fs = std::filesystem;

constexpr size_t kBlock = 1 << 16;

int64_t nanoseconds(const struct stat& info) {
  return int64_t(info.st_mtim.tv_sec) * 1'000'000'000 + info.st_mtim.tv_nsec;
}

void read_at(int fd, char* into, int64_t bytes, int64_t offset, const std::string& name) {
  while (bytes > 0) {
    const ssize_t n = ::pread(fd, into, size_t(bytes), off_t(offset));
    if (n < 0 && errno == EINTR) continue;
    MOEGRAFT_CHECK(n > 0, "cannot read ", name, ": ", n == 0 ? "the file ends early" : std::strerror(errno));
    into += n, offset += n, bytes -= n;
  }
}

// Whether anything but zeros follows.
bool holds_more(int fd, int64_t offset) {
  std::string block(kBlock, '\0');
  for (ssize_t n; (n = ::pread(fd, block.data(), block.size(), off_t(offset))) > 0; offset += n)
    if (std::any_of(block.begin(), block.begin() + n, [](char c) { return c != 0; })) return true;
  return false;
}

// libarchive has failures without a text.
std::string reason(archive* a) {
  const char* text = ::archive_error_string(a);
  return text != nullptr ? text : "unreadable";
}

// For large files that need not survive a restart (Filesystem Hierarchy Standard 3.0, 5.15): /tmp is often memory.
fs::path spool_folder() {
  const char* chosen = std::getenv("TMPDIR");
  if (chosen != nullptr && *chosen != '\0') return chosen;
  return ::access("/var/tmp", W_OK) == 0 ? "/var/tmp" : "/tmp";
}

}  // namespace

Spool::Spool() : folder_(spool_folder()) {
  std::string pattern = (folder_ / "moegraft-tar-XXXXXX").string();
  fd_ = ::mkostemp(pattern.data(), O_CLOEXEC);
  MOEGRAFT_CHECK(fd_ >= 0, "cannot make a temporary file in ", folder_.string(), ": ", std::strerror(errno),
                 " (TMPDIR names another folder)");
  ::unlink(pattern.c_str());  // gone with its last descriptor, however the process ends
}

Spool::~Spool() {
  if (fd_ >= 0) ::close(fd_);
}

void Spool::append(const void* data, size_t bytes, const std::string& whose) {
  MOEGRAFT_CHECK(int64_t(bytes) <= kMostBytes - size_, whose, ": the pictures of compressed tars take more than ",
                 kMostBytes >> 30,
                 " GiB here; unpack them once where there is room: gunzip -k (or unzstd), and name the .tar");
  const char* at = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = ::pwrite(fd_, at, bytes, off_t(size_));
    if (n < 0 && errno == EINTR) continue;
    MOEGRAFT_CHECK(n > 0, whose, ": no room for its pictures in ", folder_.string(), ": ", std::strerror(errno),
                   "; free some, set TMPDIR, or unpack it (gunzip -k, unzstd) and name the .tar");
    at += n, size_ += n, bytes -= size_t(n);
  }
}

TarReader::TarReader(const fs::path& path) : path_(path), fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
  struct stat info{};
  if (fd_ < 0 || ::fstat(fd_, &info) != 0) fail("cannot read ", path.string(), ": ", std::strerror(errno));
  try {
    MOEGRAFT_CHECK(S_ISREG(info.st_mode), "cannot read ", path.string(), ": not a regular file");
    MOEGRAFT_CHECK(info.st_size > 0, path.string(), " is empty, expected a tar");
    file_bytes_ = info.st_size, modified_ns_ = nanoseconds(info);
    archive_ = ::archive_read_new();
    MOEGRAFT_INVARIANT(archive_ != nullptr, "libarchive has no memory");
    ::archive_read_support_format_tar(archive_);
    ::archive_read_support_filter_gzip(archive_);
    ::archive_read_support_filter_zstd(archive_);
    ::archive_read_support_filter_bzip2(archive_);
    ::archive_read_support_filter_xz(archive_);
    if (::archive_read_open_fd(archive_, fd_, kBlock) != ARCHIVE_OK) damaged(reason(archive_));
  } catch (...) {
    if (archive_ != nullptr) ::archive_read_free(archive_);
    ::close(fd_);
    throw;
  }
}

TarReader::~TarReader() {
  ::archive_read_free(archive_);
  ::close(fd_);
}

void TarReader::damaged(const std::string& why) const {
  if (members_ == 0)
    fail(path_.string(), " is no tar that can be read: ", shortened(why), "; copy it again, or leave it out");
  fail(path_.string(), " is damaged or cut short at ", shortened(last_), ", its member ", members_, ": ",
       shortened(why), "; copy it again, or leave it out");
}

bool TarReader::next() {
  const int result = ::archive_read_next_header(archive_, &entry_);
  if (result == ARCHIVE_EOF) {
    // The end mark is a block of zeros behind the last member: without it the copy may have stopped between two
    // members, which nothing else tells.
    if (::archive_filter_bytes(archive_, 0) <= end_)
      log::warning(path_.string(), " has no end mark behind its ", members_, " members: it may be cut short");
    if (::archive_filter_code(archive_, 0) == ARCHIVE_FILTER_NONE &&
        holds_more(fd_, ::archive_filter_bytes(archive_, 0)))
      log::warning(path_.string(),
                   " goes on behind its end mark, which is not read: tars that were joined (cat a.tar b.tar) are to be "
                   "named each by itself");
    return false;
  }
  if (result != ARCHIVE_OK && result != ARCHIVE_WARN) damaged(reason(archive_));
  const char* name = ::archive_entry_pathname(entry_);
  if (name == nullptr) name = ::archive_entry_pathname_utf8(entry_);
  name_ = name != nullptr ? name : "";
  last_ = name_;
  ++members_;
  type_ = ::archive_entry_filetype(entry_);
  size_ = ::archive_entry_size(entry_);
  compressed_ = ::archive_filter_code(archive_, 0) != ARCHIVE_FILTER_NONE;
  offset_ = ::archive_filter_bytes(archive_, 0);  // what the tar reader has taken so far: all headers of this member
  if (size_ < 0) damaged("a negative size");
  const bool holes = ::archive_entry_sparse_count(entry_) >
                     0;  // fewer bytes lie there than it says; refused by who takes it (strange)
  end_ = holes ? offset_ : offset_ + (size_ + 511) / 512 * 512;
  // libarchive seeks over what is not asked for, beyond the end too.
  if (!compressed_ && !holes && size_ > file_bytes_ - offset_)
    damaged(detail::concat("it says ", size_, " bytes, ", std::max<int64_t>(0, file_bytes_ - offset_), " are there"));
  return true;
}

std::string TarReader::strange() const {
  if (::archive_entry_hardlink(entry_) != nullptr || type_ == AE_IFLNK)
    return "is a link, not a file; pack the files themselves (tar --dereference --hard-dereference)";
  if (type_ != AE_IFREG && type_ != AE_IFDIR) return "is a device or a pipe, not a file";
  if (::archive_entry_sparse_count(entry_) > 0) return "is stored with holes; pack it without tar --sparse";
  if (name_.starts_with("/")) return "is an absolute path; pack it relative to a folder";
  for (const auto& part : fs::path(name_))
    if (part == "..") return "leads out of the tar; pack it without \"..\"";
  return {};
}

std::string TarReader::read_text(int64_t most) {
  MOEGRAFT_CHECK(size_ <= most, path_.string(), ": ", shortened(name_), " is a text of ", size_, " bytes, at most ",
                 most, " are read");
  std::string text(size_t(size_), '\0');
  for (size_t done = 0; done < text.size();) {
    const auto n = ::archive_read_data(archive_, text.data() + done, text.size() - done);
    if (n <= 0) damaged(n < 0 ? reason(archive_) : "it ends early");
    done += size_t(n);
  }
  return text;
}

void TarReader::spool(Spool& into) {
  const void* data = nullptr;
  size_t bytes = 0;
  la_int64_t at = 0;
  int64_t done = 0;
  for (int result; (result = ::archive_read_data_block(archive_, &data, &bytes, &at)) != ARCHIVE_EOF;) {
    if (result != ARCHIVE_OK && result != ARCHIVE_WARN) damaged(reason(archive_));
    into.append(data, bytes, path_.string());
    done += int64_t(bytes);
  }
  if (done != size_) damaged(detail::concat("it says ", size_, " bytes, ", done, " are there"));
}

int64_t TarStore::add(std::string member, int64_t offset, int64_t bytes, std::shared_ptr<Spool> spool) {
  members_.push_back({std::move(member), offset, bytes});
  spool_ = std::move(spool);
  return int64_t(members_.size()) - 1;
}

std::string TarStore::read(int64_t index) const {
  const Member& member = members_[size_t(index)];
  std::string bytes(size_t(member.bytes), '\0');
  if (spool_) {
    read_at(spool_->descriptor(), bytes.data(), member.bytes, member.offset, name(index));
    return bytes;
  }
  // Opened for each picture: a data set may have more tars than a process may have files open.
  const int fd = ::open(path().c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) fail<SourceChanged>(path().string(), " cannot be read any more: ", std::strerror(errno), "; start again");
  struct Close {
    int fd;
    ~Close() { ::close(fd); }
  } close{fd};
  struct stat info{};
  if (::fstat(fd, &info) != 0 || info.st_size != file_bytes_ || nanoseconds(info) != modified_ns_)
    fail<SourceChanged>(path().string(), " was changed while it is in use: start again");
  read_at(fd, bytes.data(), member.bytes, member.offset, name(index));
  return bytes;
}

}  // namespace moegraft::io
