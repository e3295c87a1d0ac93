#include "files.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>

#include "moegraft/base/check.h"

namespace moegraft::tokenizer {

namespace fs = std::filesystem;

std::string read_file(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  MOEGRAFT_CHECK(in && !fs::is_directory(path), path.string(), ": cannot read: ", std::strerror(errno ? errno : EISDIR));
  std::string bytes{std::istreambuf_iterator<char>(in), {}};
  MOEGRAFT_CHECK(!in.bad(), path.string(), ": read failed: ", std::strerror(errno));
  return bytes;
}

void write_file(const fs::path& path, std::string_view bytes) {
  const fs::path temporary = path.string() + ".tmp";
  std::ofstream out(temporary, std::ios::binary | std::ios::trunc);
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  out.close();
  std::error_code error;
  if (out) fs::rename(temporary, path, error);
  if (out && !error) return;
  const std::string reason = error ? error.message() : std::strerror(errno);
  fs::remove(temporary, error);
  fail<UserError>(path.string(), ": cannot write: ", reason);
}

nlohmann::json read_json(const fs::path& path) {
  const std::string bytes = read_file(path);
  try {
    return nlohmann::json::parse(bytes);
  } catch (const nlohmann::json::exception& e) {
    fail<UserError>(path.string(), ": not valid JSON (", e.what(), "); the file may be truncated, fetch it again");
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
  if (it->is_object() && it->contains("content") && (*it)["content"].is_string()) return (*it)["content"].get<std::string>();
  return {};
}

}  // namespace moegraft::tokenizer
