#include "moegraft/base/progress.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "moegraft/base/clock.h"
#include "moegraft/base/log.h"

namespace moegraft {

using Clock = std::chrono::steady_clock;

std::string format_seconds(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) return "?";
  const auto s = static_cast<int64_t>(seconds + 0.5);
  char buffer[32];
  if (s >= 3600)
    std::snprintf(buffer, sizeof buffer, "%ld:%02ld:%02ld", long(s / 3600), long(s / 60 % 60), long(s % 60));
  else
    std::snprintf(buffer, sizeof buffer, "%ld:%02ld", long(s / 60), long(s % 60));
  return buffer;
}

std::string format_count(double value) {
  const char* suffix[] = {"", " k", " M", " B", " T"};
  int i = 0;
  while (std::abs(value) >= 1000 && i < 4) value /= 1000, ++i;
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, i == 0 ? "%.4g%s" : "%.2f%s", value, suffix[i]);
  return buffer;
}

Progress::Progress(std::string title, int64_t total)
    : title_(std::move(title)), total_(total), terminal_(isatty(STDERR_FILENO)), start_(Clock::now()), drawn_(start_) {}

Progress::~Progress() {
  if (!finished_ && terminal_ && done_ > 0) std::fputc('\n', stderr);
}

void Progress::update(int64_t done, const std::string& status) {
  done_ = done;
  status_ = status;
  const auto now = Clock::now();
  if (now - drawn_ < (terminal_ ? std::chrono::milliseconds(100) : std::chrono::milliseconds(10000))) return;
  drawn_ = now;
  draw(false);
}

void Progress::finish() {
  if (finished_) return;
  finished_ = true;
  draw(true);
}

void Progress::draw(bool last) {
  const double elapsed = seconds_since(start_);
  const double rate = elapsed > 0 ? double(done_ - first_) / elapsed : 0;
  const double eta = rate > 0 ? double(total_ - done_) / rate : INFINITY;
  const double share = total_ > 0 ? std::clamp(double(done_) / double(total_), 0.0, 1.0) : 1;
  const std::string time = last ? format_seconds(elapsed) : format_seconds(elapsed) + " < " + format_seconds(eta);
  if (!terminal_) {
    log::info(title_, " ", done_, "/", total_, " (", int(share * 100), " %) ", time, status_.empty() ? "" : " · ",
              status_);
    return;
  }
  const int width = 24, filled = int(share * width);
  std::string bar;
  for (int i = 0; i < width; ++i) bar += i < filled ? "█" : "░";
  std::fprintf(stderr, "\r\033[K%s %s %ld/%ld %s %s%s", title_.c_str(), bar.c_str(), long(done_), long(total_),
               time.c_str(), status_.c_str(), last ? "\n" : "");
  std::fflush(stderr);
}

}  // namespace moegraft
