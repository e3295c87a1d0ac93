#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "moegraft/base/check.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"
#include "moegraft/run/run_dir.h"

namespace moegraft::run {

LineLog::LineLog(std::filesystem::path path) : path_(std::move(path)) {}
LineLog::~LineLog() { close(); }
LineLog::LineLog(LineLog&& other) noexcept : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)) {}
LineLog& LineLog::operator=(LineLog&& other) noexcept {
  close();
  path_ = std::move(other.path_);
  fd_ = std::exchange(other.fd_, -1);
  return *this;
}

void LineLog::close() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

void LineLog::append(const std::string& line) {
  MOEGRAFT_INVARIANT(!line.empty() && line.find('\n') == std::string::npos, "a log line must be one line");
  if (fd_ < 0) fd_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  MOEGRAFT_CHECK(fd_ >= 0, "cannot open ", path_.string(), ": ", std::strerror(errno));
  struct stat before{};
  ::fstat(fd_, &before);
  const std::string bytes = line + "\n";
  for (size_t done = 0; done < bytes.size();) {
    const ssize_t n = ::write(fd_, bytes.data() + done, bytes.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      const int error = errno;
      [[maybe_unused]] const int cut = ::ftruncate(fd_, before.st_size);
      fail<UserError>("cannot write ", path_.string(), ": ", std::strerror(error));
    }
    done += size_t(n);
  }
}

namespace {

std::string lines_up_to(const std::string& text, int64_t step) {
  std::string kept;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    if (end == std::string::npos) break;  // the last line was cut short
    const auto j = io::Json::parse(text.begin() + begin, text.begin() + end, nullptr, /*allow_exceptions=*/false);
    const bool whole = j.is_object();
    const bool later = whole && j.contains("step") && j["step"].is_number() && j["step"].get<double>() > double(step);
    if (whole && !later) kept.append(text, begin, end + 1 - begin);
    begin = end + 1;
  }
  return kept;
}

}  // namespace

void LineLog::cut_back(int64_t step) {
  if (!std::filesystem::exists(path_)) return;
  close();
  const std::string text = io::read_file(path_), kept = lines_up_to(text, step);
  if (kept != text) io::write_file_atomic(path_, kept);
}

void LineLog::copy_from(const std::filesystem::path& other, int64_t step) {
  if (!std::filesystem::exists(other)) return;
  close();
  io::write_file_atomic(path_, lines_up_to(io::read_file(other), step));
}

void LineLog::sync() {
  if (fd_ >= 0) ::fsync(fd_);
}

}  // namespace moegraft::run
