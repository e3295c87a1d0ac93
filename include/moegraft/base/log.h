#pragma once
// Logging to stderr: stdout belongs to results (--json). spdlog stays behind this header, see
// third_party/cmake/Dependencies.cmake.

#include <string>

#include "moegraft/base/check.h"

namespace moegraft::log {

enum class Level { debug, info, warning, error };

void set_level(Level level);  // default: info
// This process is one of several: each line names its rank, and ranks other than 0 write errors only.
void set_rank(long rank);
void write(Level level, const std::string& message);

template <class... Args>
void debug(const Args&... args) {
  write(Level::debug, moegraft::detail::concat(args...));
}
template <class... Args>
void info(const Args&... args) {
  write(Level::info, moegraft::detail::concat(args...));
}
template <class... Args>
void warning(const Args&... args) {
  write(Level::warning, moegraft::detail::concat(args...));
}
template <class... Args>
void error(const Args&... args) {
  write(Level::error, moegraft::detail::concat(args...));
}

}  // namespace moegraft::log
