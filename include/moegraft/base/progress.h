#pragma once
// A progress bar with rate and ETA on a terminal (stderr), plain lines every ~10 s otherwise.

#include <chrono>
#include <cstdint>
#include <string>

namespace moegraft {

class Progress {
 public:
  Progress(std::string title, int64_t total);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // Sets the count done and a short status text ("loss 1.23 · 2.9k tok/s"). Cheap: redraws at most ten times a second.
  void update(int64_t done, const std::string& status = {});
  void finish();
  // A resumed job starts at `done`: the rate counts only what this process did.
  void start_at(int64_t done) { first_ = done; }

 private:
  void draw(bool last);
  std::string title_, status_;
  int64_t total_, done_ = 0, first_ = 0;
  bool terminal_, finished_ = false;
  std::chrono::steady_clock::time_point start_, drawn_;
};

std::string format_seconds(double seconds);  // "1:02:03" or "4:05"
std::string format_count(double value);      // "4.73 M", "1.2 k"

}  // namespace moegraft
