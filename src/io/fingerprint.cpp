#include "moegraft/io/fingerprint.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <nlohmann/json.hpp>

#include "moegraft/base/check.h"
#include "moegraft/io/files.h"
#include "xxh64.h"

namespace moegraft::io {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kWhole = uint64_t{16} << 20, kPage = 4096, kMostTensors = 65536, kPages = 4096,
                   kStride = uint64_t{4} << 20, kMostPages = 8192, kMostHeader = 100'000'000;

class Sampler {
 public:
  explicit Sampler(const fs::path& path) : path_(path), fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
    struct stat info{};
    if (fd_ < 0 || ::fstat(fd_, &info) != 0) fail("cannot read ", path.string(), ": ", std::strerror(errno));
    MOEGRAFT_CHECK(S_ISREG(info.st_mode), "cannot read ", path.string(), ": not a regular file");
    size_ = uint64_t(info.st_size);
  }
  ~Sampler() {
    if (fd_ >= 0) ::close(fd_);
  }
  Sampler(const Sampler&) = delete;
  Sampler& operator=(const Sampler&) = delete;

  uint64_t size() const { return size_; }
  std::string read(uint64_t at, uint64_t bytes) const {
    std::string text(at < size_ ? std::min(bytes, size_ - at) : 0, '\0');
    for (size_t done = 0; done < text.size();) {
      const ssize_t n = ::pread(fd_, text.data() + done, text.size() - done, off_t(at + done));
      if (n < 0 && errno == EINTR) continue;
      MOEGRAFT_CHECK(n > 0, "cannot read ", path_.string(), ": ", n == 0 ? "it ends early" : std::strerror(errno));
      done += size_t(n);
    }
    return text;
  }

 private:
  fs::path path_;
  int fd_;
  uint64_t size_ = 0;
};

// Where the tensors of a safetensors file lie; empty for anything else.
std::vector<std::pair<uint64_t, uint64_t>> tensor_ranges(const Sampler& file, std::string& header) {
  const std::string first = file.read(0, 8);
  uint64_t length = 0;
  if (first.size() == 8) std::memcpy(&length, first.data(), 8);
  if (length == 0 || length > kMostHeader || length > file.size() - 8) return {};
  header = file.read(8, length);
  std::vector<std::pair<uint64_t, uint64_t>> ranges;
  const auto j = nlohmann::json::parse(header, nullptr, /*allow_exceptions=*/false);
  if (!j.is_object()) return {};
  for (const auto& [name, entry] : j.items()) {
    const auto offsets = entry.is_object() ? entry.find("data_offsets") : entry.end();
    if (!entry.is_object() || offsets == entry.end() || !offsets->is_array() || offsets->size() != 2 ||
        !(*offsets)[0].is_number_unsigned() || !(*offsets)[1].is_number_unsigned())
      continue;
    const uint64_t begin = (*offsets)[0].get<uint64_t>(), end = (*offsets)[1].get<uint64_t>();
    if (begin < end && end <= file.size() - 8 - length) ranges.emplace_back(8 + length + begin, 8 + length + end);
  }
  return ranges;
}

}  // namespace

std::string fingerprint_file(const fs::path& path) {
  const Sampler file(path);
  Xxh64 hash;
  const auto add = [&](const std::string& bytes) { hash.update(bytes.data(), bytes.size()); };
  add(std::to_string(file.size()) + "\n");
  if (file.size() <= kWhole) {
    add(file.read(0, file.size()));
    return hash.hex();
  }
  std::string header;
  auto ranges =
      path.extension() == ".safetensors" ? tensor_ranges(file, header) : std::vector<std::pair<uint64_t, uint64_t>>{};
  add(header);
  if (ranges.empty())
    for (uint64_t i = 0; i < kPages; ++i) add(file.read(file.size() / kPages * i, kPage));
  const size_t stride = ranges.size() / kMostTensors + 1;
  const uint64_t part = std::max(kStride, file.size() / kMostPages);
  for (size_t i = 0; i < ranges.size(); i += stride) {
    const auto [begin, end] = ranges[i];
    const uint64_t parts = (end - begin + part - 1) / part, length = (end - begin) / parts,
                   bytes = std::min(kPage, length);
    for (uint64_t p = 0; p < parts; ++p) add(file.read(begin + p * length + (length - bytes) / 2, bytes));
  }
  add(file.read(0, kPage));
  add(file.read(file.size() - kPage, kPage));
  return hash.hex();
}

std::string fingerprint_files(std::vector<fs::path> files) {
  if (files.empty()) return {};
  std::sort(files.begin(), files.end(),
            [](const fs::path& a, const fs::path& b) { return a.filename() < b.filename(); });
  std::string text;
  for (const auto& file : files) text += file.filename().string() + " " + fingerprint_file(file) + "\n";
  return checksum_hex(text);
}

std::string fingerprint_folder(const fs::path& path, bool (*counts)(const std::string& name)) {
  std::error_code error;
  if (!fs::is_directory(path, error)) return fingerprint_file(path);
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(path))
    if (entry.is_regular_file() && counts(entry.path().filename().string())) files.push_back(entry.path());
  return fingerprint_files(std::move(files));
}

}  // namespace moegraft::io
