#include "moegraft/checkpoint/checkpoint.h"

#include <algorithm>

#include "directory.h"
#include "format.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/io/files.h"

namespace fs = std::filesystem;

namespace moegraft::checkpoint {

std::vector<fs::path> list_checkpoints(const fs::path& root) {
  std::vector<fs::path> dirs;
  std::error_code error;
  for (fs::directory_iterator it(root, error), end; !error && it != end; it.increment(error))
    if (it->is_directory() && step_of(it->path())) dirs.push_back(it->path());
  std::sort(dirs.begin(), dirs.end(), [](const auto& a, const auto& b) { return *step_of(a) < *step_of(b); });
  return dirs;
}

std::string find_damage(const fs::path& dir) {
  try {
    if (!fs::exists(dir / kManifest)) return detail::concat(kManifest, " is missing");
    const auto manifest = read_manifest(dir);
    for (const auto& [name, expected] : manifest.files) {
      if (!fs::exists(dir / name)) return detail::concat(name, " is missing");
      const auto size = fs::file_size(dir / name);
      if (size != expected.size) return detail::concat(name, " has ", size, " bytes, expected ", expected.size);
      if (describe_file(dir / name).checksum != expected.checksum)
        return detail::concat(name, ": its checksum differs from the manifest's");
    }
    if (manifest.world_size > 1)
      for (const auto kind : {Kind::adapter, Kind::optimizer}) Assembly(dir, manifest, kind);
    return {};
  } catch (const std::exception& e) { return e.what(); }
}

std::optional<fs::path> find_latest(const fs::path& root) {
  const auto dirs = list_checkpoints(root);
  std::string newest;
  for (auto dir = dirs.rbegin(); dir != dirs.rend(); ++dir) {
    const auto damage = find_damage(*dir);
    if (damage.empty()) return *dir;
    if (newest.empty()) newest = damage;
    log::warning("the checkpoint ", dir->string(), " is damaged (", damage, ")",
                 dir + 1 == dirs.rend() ? "" : "; trying the one before it");
  }
  MOEGRAFT_CHECK(dirs.empty(), "every checkpoint in ", root.string(), " is damaged (", dirs.back().filename().string(),
                 ": ", newest, "): put one back from a copy, or move the folder away to start again from step 0");
  return {};
}

std::optional<fs::path> find_best(const fs::path& root, bool lower_is_better) {
  std::optional<fs::path> best;
  double best_measure = 0;
  for (const auto& dir : list_checkpoints(root)) {
    const auto measure = recorded_measure(dir);
    if (!measure || (best && !is_better(*measure, best_measure, lower_is_better)) || !find_damage(dir).empty())
      continue;
    best = dir, best_measure = *measure;
  }
  return best;
}

Checkpoint load(const fs::path& dir) {
  MOEGRAFT_CHECK(fs::is_directory(dir), "no checkpoint at ", dir.string());
  const auto damage = find_damage(dir);
  MOEGRAFT_CHECK(damage.empty(), "the checkpoint ", dir.string(), " is damaged: ", damage,
                 "; take an earlier one or --resume auto");
  const auto manifest = read_manifest(dir);
  Checkpoint checkpoint;
  checkpoint.dir = dir;
  checkpoint.step = manifest.step;
  checkpoint.measure = manifest.measure;
  checkpoint.parameters = Assembly(dir, manifest, Kind::adapter).tensors();
  checkpoint.optimizer = Assembly(dir, manifest, Kind::optimizer).tensors();
  checkpoint.state = io::read_file(dir / kState);
  return checkpoint;
}

}  // namespace moegraft::checkpoint
