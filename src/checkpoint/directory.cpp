#include "directory.h"

#include <fcntl.h>
#include <stdio.h>

#include <cerrno>
#include <charconv>
#include <cstring>

#include "format.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/checkpoint/checkpoint.h"

namespace fs = std::filesystem;

namespace moegraft::checkpoint {

constexpr const char* kPrefix = "step-";

std::string step_name(int64_t step) {
  char text[32];
  snprintf(text, sizeof text, "%s%08lld", kPrefix, static_cast<long long>(step));
  return text;
}

std::optional<int64_t> step_of(const fs::path& dir) {
  const auto name = dir.filename().string();
  if (!name.starts_with(kPrefix)) return {};
  int64_t step = 0;
  const char* begin = name.data() + std::strlen(kPrefix);
  const auto [end, error] = std::from_chars(begin, name.data() + name.size(), step);
  if (error != std::errc() || end != name.data() + name.size()) return {};
  return step;
}

// Under another name first: a half-removed directory must not look like a damaged checkpoint.
void remove_checkpoint(const fs::path& dir) {
  const auto hidden = dir.parent_path() / (kRemoving + dir.filename().string());
  fs::remove_all(hidden);
  fs::rename(dir, hidden);
  fs::remove_all(hidden);
}

void set_aside(const fs::path& dir) {
  fs::path aside = dir.parent_path() / ("damaged-" + dir.filename().string());
  for (int64_t i = 2; fs::exists(aside); ++i)
    aside = dir.parent_path() / ("damaged-" + dir.filename().string() + "-" + std::to_string(i));
  fs::rename(dir, aside);
  log::warning("moved ", dir.string(), " aside, to ", aside.filename().string());
}

void move_into_place(const fs::path& fresh, const fs::path& target) {
  if (renameat2(AT_FDCWD, fresh.c_str(), AT_FDCWD, target.c_str(), RENAME_NOREPLACE) == 0) return;
  if (errno == EEXIST && renameat2(AT_FDCWD, fresh.c_str(), AT_FDCWD, target.c_str(), RENAME_EXCHANGE) == 0) {
    fs::remove_all(fresh);  // now the old one
    return;
  }
  // File systems without these flags (some network ones): two steps.
  if (fs::exists(target)) remove_checkpoint(target);
  fs::rename(fresh, target);
}

void remove_leftovers(const fs::path& root) {
  for (const auto& entry : fs::directory_iterator(root)) {
    const auto name = entry.path().filename().string();
    if (name.starts_with(kWriting) || name.starts_with(kRemoving)) fs::remove_all(entry.path());
  }
}

void remove_old(const fs::path& root, int64_t keep, bool keep_best, bool lower_is_better) {
  const auto dirs = list_checkpoints(root);
  if (int64_t(dirs.size()) <= keep) return;
  fs::path best;
  std::optional<double> best_measure;
  if (keep_best)
    for (const auto& dir : dirs) {
      const auto measure = recorded_measure(dir);
      if (measure && (!best_measure || is_better(*measure, *best_measure, lower_is_better)))
        best = dir, best_measure = measure;
    }
  try {
    for (size_t i = 0; i + keep < dirs.size(); ++i)
      if (dirs[i] != best) remove_checkpoint(dirs[i]);
  } catch (const std::exception& e) {
    log::warning("cannot remove an old checkpoint: ", e.what());  // the new one is safe: training goes on
  }
}

}  // namespace moegraft::checkpoint
