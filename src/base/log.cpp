#include "moegraft/base/log.h"

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include "moegraft/base/text.h"

namespace moegraft::log {
namespace {

spdlog::logger& logger() {
  static auto instance = [] {
    auto l = spdlog::stderr_color_mt("moegraft");
    l->set_pattern("%H:%M:%S %^%l%$ %v");
    return l;
  }();
  return *instance;
}

spdlog::level::level_enum native(Level level) {
  switch (level) {
    case Level::debug: return spdlog::level::debug;
    case Level::info: return spdlog::level::info;
    case Level::warning: return spdlog::level::warn;
    case Level::error: return spdlog::level::err;
  }
  return spdlog::level::info;
}

}  // namespace

void set_level(Level level) { logger().set_level(native(level)); }
void set_rank(long rank) {
  if (rank > 0) set_level(Level::error);
  logger().set_pattern("%H:%M:%S %^%l%$ [rank " + std::to_string(rank) + "] %v");
}
// A line that quotes a file may be as long as the file.
constexpr size_t kLongest = 4000;
void write(Level level, const std::string& message) { logger().log(native(level), "{}", shortened(message, kLongest)); }

}  // namespace moegraft::log
