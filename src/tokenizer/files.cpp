#include "files.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>

#include "moegraft/base/check.h"
#include "moegraft/base/text.h"

namespace moegraft::tokenizer {

namespace fs = std::filesystem;

std::string read_file(const fs::path& path) {
  std::error_code ignored;
  MOEGRAFT_CHECK(!fs::exists(path, ignored) || fs::is_regular_file(path, ignored), path.string(),
                 ": cannot read: it is no regular file");
  std::ifstream in(path, std::ios::binary);
  MOEGRAFT_CHECK(in, path.string(), ": cannot read: ", std::strerror(errno));
  std::string bytes{std::istreambuf_iterator<char>(in), {}};
  MOEGRAFT_CHECK(!in.bad(), path.string(), ": read failed: ", std::strerror(errno));
  return bytes;
}

void write_files(const fs::path& dir, const std::vector<std::pair<std::string, std::string>>& files) {
  std::vector<fs::path> temporary;
  const auto give_up = [&](const fs::path& path, int reason) {
    std::error_code ignored;
    for (const auto& t : temporary) fs::remove(t, ignored);
    fail<UserError>(path.string(), ": cannot write: ", std::strerror(reason));
  };
  for (const auto& [name, bytes] : files) {
    temporary.push_back(dir / (name + ".tmp-" + std::to_string(::getpid())));
    const int fd = ::open(temporary.back().c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666);
    bool written = fd >= 0;
    for (size_t done = 0; written && done < bytes.size();) {
      const ssize_t n = ::write(fd, bytes.data() + done, bytes.size() - done);
      written = n > 0 || (n < 0 && errno == EINTR);
      if (n > 0) done += size_t(n);
    }
    written = written && ::fsync(fd) == 0;
    const int reason = errno;
    if (fd >= 0) ::close(fd);
    if (!written) give_up(dir / name, reason);
  }
  for (size_t i = 0; i < files.size(); ++i)
    if (::rename(temporary[i].c_str(), (dir / files[i].first).c_str()) != 0) give_up(dir / files[i].first, errno);
}

nlohmann::json read_json(const fs::path& path) {
  const std::string bytes = read_file(path);
  MOEGRAFT_CHECK(json_depth(bytes) <= kMostJsonDepth, path.string(), ": brackets nest ", json_depth(bytes),
                 " deep, expected ", kMostJsonDepth, " at most");
  try {
    return nlohmann::json::parse(bytes);
  } catch (const nlohmann::json::exception& e) {
    fail<UserError>(path.string(), ": not valid JSON (", shortened(e.what(), 200),
                    "); the file may be truncated, fetch it again");
  }
}

nlohmann::json read_tokenizer_config(const fs::path& dir) {
  const fs::path path = dir / "tokenizer_config.json";
  if (!fs::exists(path)) return nlohmann::json::object();
  auto config = read_json(path);
  MOEGRAFT_CHECK(config.is_object(), path.string(), ": expected a JSON object, got ", config.type_name());
  return config;
}

std::string token_content(const nlohmann::json& config, const char* key) {
  const auto it = config.find(key);
  if (it == config.end()) return {};
  if (it->is_string()) return it->get<std::string>();
  if (it->is_object() && it->contains("content") && (*it)["content"].is_string())
    return (*it)["content"].get<std::string>();
  return {};
}

}  // namespace moegraft::tokenizer
