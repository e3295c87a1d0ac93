#include <cstdlib>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/config/config.h"

namespace moegraft::config {
namespace {

std::string value_of(const std::string& name, const std::string& path, const std::string& key) {
  const char* value = std::getenv(name.c_str());
  MOEGRAFT_CHECK_USAGE(value != nullptr && *value != '\0', key, ": the environment variable ", name, " is not set (in ",
                       path, ")");
  return value;
}

bool is_name(char c, bool first) {
  return c == '_' || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (!first && c >= '0' && c <= '9');
}

}  // namespace

std::string expand_path(const std::string& path, const std::string& key) {
  std::string out;
  size_t i = 0;
  if (path == "~" || path.starts_with("~/")) out = value_of("HOME", path, key), i = 1;
  MOEGRAFT_CHECK_USAGE(i > 0 || !path.starts_with("~"), key, ": ", path,
                       ": only ~ and ~/… are expanded; write the other user's folder out");
  while (i < path.size()) {
    if (path[i] != '$') {
      out += path[i++];
      continue;
    }
    const bool braces = i + 1 < path.size() && path[i + 1] == '{';
    size_t begin = i + 1 + braces, end = begin;
    while (end < path.size() && is_name(path[end], end == begin)) ++end;
    const bool closed = !braces || (end < path.size() && path[end] == '}');
    MOEGRAFT_CHECK_USAGE(end > begin && closed, key, ": ", path, ": expected $NAME or ${NAME} at byte ", i);
    out += value_of(path.substr(begin, end - begin), path, key);
    i = end + braces;
  }
  if (out != path) log::info(key, ": ", path, " is ", out);
  return out;
}

}  // namespace moegraft::config
