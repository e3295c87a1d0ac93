#include "moegraft/io/read_ahead.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <numeric>
#include <thread>
#include <tuple>

#include "moegraft/base/check.h"

namespace moegraft::io {
namespace {

constexpr int64_t kAlignment = 64;

class File {
 public:
  explicit File(std::filesystem::path path) : path_(std::move(path)), fd_(::open(path_.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (fd_ < 0) fail("cannot read ", path_.string(), ": ", std::strerror(errno));
  }
  ~File() { ::close(fd_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  void check_holds(int64_t bytes) const {
    if (S_ISREG(status().st_mode) && status().st_size < bytes) fail_short(bytes);
  }
  void read(int64_t offset, int64_t bytes, char* to) const {
    while (bytes > 0) {
      const ssize_t n = ::pread(fd_, to, size_t(bytes), offset);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) fail("cannot read ", path_.string(), ": ", std::strerror(errno));
      if (n == 0) fail_short(offset + bytes);
      offset += n, to += n, bytes -= n;
    }
  }

 private:
  struct stat status() const {
    struct stat info{};
    if (::fstat(fd_, &info) != 0) fail("cannot read ", path_.string(), ": ", std::strerror(errno));
    return info;
  }
  [[noreturn]] void fail_short(int64_t needed) const {
    fail(path_.string(), " has ", status().st_size, " bytes, ", needed,
         " are needed: it was cut short while it is in use");
  }

  std::filesystem::path path_;
  int fd_;
};

struct Request {
  const File* file = nullptr;
  int64_t offset = 0;  // in the file
  size_t round = 0;
  ReadPiece piece;
};

// Pieces in the order of the files, as many to a round as a buffer holds.
std::vector<Request> plan(const std::vector<FileRange>& ranges, const std::vector<at::Tensor>& buffers,
                          int64_t piece_bytes, std::map<std::filesystem::path, File>& files) {
  std::vector<size_t> order(ranges.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return std::tie(ranges[a].file, ranges[a].offset) < std::tie(ranges[b].file, ranges[b].offset);
  });
  const int64_t room = buffers.front().numel(), most = std::min(piece_bytes, room);
  std::vector<Request> out;
  size_t round = 0;
  int64_t filled = 0;
  for (const size_t r : order) {
    const FileRange& range = ranges[r];
    if (range.bytes == 0) continue;
    const File& file = files.try_emplace(range.file, range.file).first->second;
    file.check_holds(range.offset + range.bytes);
    for (int64_t begin = 0; begin < range.bytes;) {
      int64_t bytes = std::min(range.bytes - begin, most);
      if (filled + bytes > room) {  // what still fits, then the next buffer
        bytes = room - filled;
        if (bytes == 0) {
          ++round, filled = 0;
          continue;
        }
      }
      out.push_back(
          {&file, range.offset + begin, round, {r, begin, buffers[round % buffers.size()].narrow(0, filled, bytes)}});
      begin += bytes;
      filled = std::min(room, (filled + bytes + kAlignment - 1) / kAlignment * kAlignment);
    }
  }
  return out;
}

// The threads and what they share with the caller. A round may be read once the one before it in its buffer has been
// used.
class Readers {
 public:
  Readers(std::vector<Request>& requests, size_t buffers, int64_t threads) : requests_(requests), open_(buffers) {
    left_.resize(requests.empty() ? 0 : requests.back().round + 1);
    for (const Request& r : requests) ++left_[r.round];
    for (int64_t i = 0; i < std::min<int64_t>(threads, int64_t(requests.size())); ++i)
      threads_.emplace_back([this] { work(); });
  }
  ~Readers() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    for (auto& thread : threads_) thread.join();
  }
  size_t rounds() const { return left_.size(); }

  void wait_for(size_t round) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return error_ || left_[round] == 0; });
    if (error_) std::rethrow_exception(error_);
  }
  void give_back() {
    {
      const std::lock_guard lock(mutex_);
      ++open_;
    }
    changed_.notify_all();
  }

 private:
  void work() {
    for (size_t i; (i = next_++) < requests_.size();) {
      const Request& r = requests_[i];
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return stopping_ || error_ || r.round < open_; });
        if (stopping_ || error_) return;
      }
      std::exception_ptr error;
      try {
        r.file->read(r.offset, r.piece.bytes.numel(), static_cast<char*>(r.piece.bytes.mutable_data_ptr()));
      } catch (...) { error = std::current_exception(); }
      const std::lock_guard lock(mutex_);
      if (error && !error_) error_ = error;
      if (--left_[r.round] == 0 || error) changed_.notify_all();
    }
  }

  const std::vector<Request>& requests_;
  std::atomic<size_t> next_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<int64_t> left_;  // of each round: pieces not yet read
  size_t open_;                // rounds before this one may be read
  bool stopping_ = false;
  std::exception_ptr error_;
  std::vector<std::thread> threads_;
};

}  // namespace

void read_ahead(const std::vector<FileRange>& ranges, const std::vector<at::Tensor>& buffers,
                const ReadAheadOptions& options, const std::function<void(const std::vector<ReadPiece>&)>& use) {
  MOEGRAFT_INVARIANT(buffers.size() >= 2 && options.threads >= 1 && options.piece_bytes >= kAlignment &&
                         options.piece_bytes % kAlignment == 0,
                     "read_ahead: ", buffers.size(), " buffers, ", options.threads, " threads, pieces of ",
                     options.piece_bytes, " bytes");
  for (const auto& b : buffers)
    MOEGRAFT_INVARIANT(b.is_cpu() && b.is_contiguous() && b.scalar_type() == at::kByte && b.numel() >= kAlignment &&
                           b.numel() % kAlignment == 0 && b.numel() == buffers.front().numel(),
                       "read_ahead: a buffer ", b.sizes());
  std::map<std::filesystem::path, File> files;
  std::vector<Request> requests = plan(ranges, buffers, options.piece_bytes, files);
  Readers readers(requests, buffers.size(), options.threads);
  auto request = requests.begin();
  for (size_t round = 0; round < readers.rounds(); ++round) {
    readers.wait_for(round);
    std::vector<ReadPiece> pieces;
    for (; request != requests.end() && request->round == round; ++request) pieces.push_back(request->piece);
    use(pieces);
    readers.give_back();
  }
}

}  // namespace moegraft::io
