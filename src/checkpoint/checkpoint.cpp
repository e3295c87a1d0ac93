#include "moegraft/checkpoint/checkpoint.h"

#include <fcntl.h>
#include <stdio.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstring>

#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"

namespace fs = std::filesystem;

namespace moegraft::checkpoint {
namespace {

constexpr const char* kAdapter = "adapter.safetensors";
constexpr const char* kOptimizer = "optimizer.safetensors";
constexpr const char* kState = "state.json";
constexpr const char* kManifest = "manifest.json";
constexpr const char* kPrefix = "step-";
// Names that only a writer at work uses; the next writer removes them.
constexpr const char* kWriting = ".writing-";
constexpr const char* kRemoving = ".removing-";

std::string hex(uint64_t value) {
  char text[17];
  snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

// Throws nlohmann's exceptions and UserError: callers turn them into a damage report.
io::Json read_manifest(const fs::path& dir) {
  auto manifest = io::read_json(dir / kManifest);
  const auto own = manifest.at("checksum").get<std::string>();
  manifest.erase("checksum");
  MOEGRAFT_CHECK(io::checksum_hex(manifest.dump()) == own, kManifest, ": its own checksum differs");
  return manifest;
}

void write_manifest(const fs::path& dir, int64_t step, std::optional<double> measure) {
  io::Json files = io::Json::object();
  for (const char* name : {kAdapter, kOptimizer, kState})
    files[name] = {{"size", fs::file_size(dir / name)}, {"checksum", hex(io::checksum_file(dir / name))}};
  io::Json manifest = {{"format", "moegraft checkpoint"}, {"version", 1}, {"step", step}, {"measure", nullptr}, {"files", files}};
  if (measure) manifest["measure"] = *measure;
  manifest["checksum"] = io::checksum_hex(manifest.dump());
  io::write_json(dir / kManifest, manifest);
}

std::optional<double> measure_of(const io::Json& manifest) {
  const auto& measure = manifest.at("measure");
  return measure.is_null() ? std::nullopt : std::optional<double>(measure.get<double>());
}

// Like find_damage, but sizes only: what pruning needs to know without reading every byte of every checkpoint again.
std::optional<double> recorded_measure(const fs::path& dir) {
  try {
    return measure_of(read_manifest(dir));
  } catch (const std::exception&) {
    return {};
  }
}

bool is_better(double a, double b, bool lower_is_better) { return lower_is_better ? a < b : a > b; }

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

// Puts `fresh` in the place of `target`, which may exist.
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

}  // namespace

std::string step_name(int64_t step) {
  char text[32];
  snprintf(text, sizeof text, "%s%08lld", kPrefix, static_cast<long long>(step));
  return text;
}

CheckpointWriter::CheckpointWriter(fs::path root, CheckpointConfig config, bool lower_is_better)
    : root_(std::move(root)), config_(config), lower_is_better_(lower_is_better) {
  std::error_code error;
  fs::create_directories(root_, error);
  MOEGRAFT_CHECK(!error, "cannot make the folder ", root_.string(), ": ", error.message());
  for (const auto& entry : fs::directory_iterator(root_)) {
    const auto name = entry.path().filename().string();
    if (name.starts_with(kWriting) || name.starts_with(kRemoving)) fs::remove_all(entry.path());
  }
}

fs::path CheckpointWriter::save(int64_t step, const io::TensorMap& parameters, const io::TensorMap& optimizer, const std::string& state,
                                std::optional<double> measure) {
  if (measure && !std::isfinite(*measure)) measure.reset();
  const auto target = root_ / step_name(step), fresh = root_ / (kWriting + step_name(step));
  try {
    fs::remove_all(fresh);
    fs::create_directory(fresh);
    io::save_safetensors(fresh / kAdapter, parameters, {{"format", "pt"}});
    io::save_safetensors(fresh / kOptimizer, optimizer, {{"format", "pt"}});
    io::write_file_atomic(fresh / kState, state);
    write_manifest(fresh, step, measure);
    io::sync_directory(fresh);
    move_into_place(fresh, target);
    io::sync_directory(root_);
  } catch (const std::exception& e) {
    std::error_code ignored;
    fs::remove_all(fresh, ignored);
    fail<UserError>("cannot save the checkpoint ", target.string(), ": ", e.what(), " (earlier checkpoints are untouched; free some space and continue with --resume auto)");
  }
  remove_old();
  return target;
}

void CheckpointWriter::discard_after(int64_t step) {
  for (const auto& dir : list_checkpoints(root_))
    if (*step_of(dir) > step) remove_checkpoint(dir);
  io::sync_directory(root_);
}

void CheckpointWriter::remove_old() const {
  const auto dirs = list_checkpoints(root_);
  if (int64_t(dirs.size()) <= config_.keep) return;
  fs::path best;
  std::optional<double> best_measure;
  if (config_.keep_best)
    for (const auto& dir : dirs) {
      const auto measure = recorded_measure(dir);
      if (measure && (!best_measure || is_better(*measure, *best_measure, lower_is_better_))) best = dir, best_measure = measure;
    }
  try {
    for (size_t i = 0; i + config_.keep < dirs.size(); ++i)
      if (dirs[i] != best) remove_checkpoint(dirs[i]);
  } catch (const std::exception& e) {
    log::warning("cannot remove an old checkpoint: ", e.what());  // the new one is safe: training goes on
  }
}

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
    MOEGRAFT_CHECK(manifest.at("format") == "moegraft checkpoint" && manifest.at("version") == 1, kManifest, ": not a moegraft checkpoint of version 1");
    for (const char* name : {kAdapter, kOptimizer, kState}) {
      const auto& entry = manifest.at("files").at(name);
      if (!fs::exists(dir / name)) return detail::concat(name, " is missing");
      const auto size = fs::file_size(dir / name);
      if (entry.at("size") != size) return detail::concat(name, " has ", size, " bytes, expected ", entry.at("size").dump());
      if (entry.at("checksum") != hex(io::checksum_file(dir / name))) return detail::concat(name, ": its checksum differs from the manifest's");
    }
    return {};
  } catch (const std::exception& e) {
    return e.what();
  }
}

std::optional<fs::path> find_latest(const fs::path& root) {
  const auto dirs = list_checkpoints(root);
  for (auto dir = dirs.rbegin(); dir != dirs.rend(); ++dir) {
    const auto damage = find_damage(*dir);
    if (damage.empty()) return *dir;
    log::warning("the checkpoint ", dir->string(), " is damaged (", damage, "); trying the one before it");
  }
  return {};
}

std::optional<fs::path> find_best(const fs::path& root, bool lower_is_better) {
  std::optional<fs::path> best;
  double best_measure = 0;
  for (const auto& dir : list_checkpoints(root)) {
    const auto measure = recorded_measure(dir);
    if (!measure || (best && !is_better(*measure, best_measure, lower_is_better)) || !find_damage(dir).empty()) continue;
    best = dir, best_measure = *measure;
  }
  return best;
}

Checkpoint load(const fs::path& dir) {
  MOEGRAFT_CHECK(fs::is_directory(dir), "no checkpoint at ", dir.string());
  const auto damage = find_damage(dir);
  MOEGRAFT_CHECK(damage.empty(), "the checkpoint ", dir.string(), " is damaged: ", damage, "; take an earlier one or --resume auto");
  const auto manifest = read_manifest(dir);
  Checkpoint checkpoint;
  checkpoint.dir = dir;
  checkpoint.step = manifest.at("step").get<int64_t>();
  checkpoint.measure = measure_of(manifest);
  checkpoint.parameters = io::load_safetensors(dir / kAdapter);
  checkpoint.optimizer = io::load_safetensors(dir / kOptimizer);
  checkpoint.state = io::read_file(dir / kState);
  return checkpoint;
}

}  // namespace moegraft::checkpoint
