#include "libtorch.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <optional>

#include "moegraft/base/check.h"
#include "moegraft/base/clock.h"
#include "moegraft/base/log.h"
#include "moegraft/base/progress.h"
#include "moegraft/base/text.h"
#include "moegraft/checkpoint/state.h"
#include "moegraft/io/files.h"
#include "moegraft/run/folder_lock.h"
#include "moegraft/run/run_dir.h"
#include "moegraft/train/codec.h"
#include "moegraft/run/signals.h"

namespace moegraft::train {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr const char* kConfig = "codec.yaml";
constexpr const char* kMetrics = "metrics.jsonl";
constexpr const char* kCheckpoints = "checkpoints";
constexpr const char* kPictures = "data.train";  // among a checkpoint's fingerprints

bool is_free(const std::string& key) {
  return key == "dir" || key == "train.log_every" || key.starts_with("data.") || key.starts_with("checkpoint.");
}

void remove_folder(const fs::path& folder) {
  std::error_code error;
  fs::remove_all(folder, error);
  if (error) log::warning("cannot remove ", folder.string(), ", which is of no more use: ", error.message());
}

run::FolderLock lock_folder(const fs::path& folder) {
  return {folder, "codec's training", "wait for it, stop it, or name another dir"};
}

// Why the training that `from` was saved by cannot go on; empty: it can.
std::string find_obstacle(const fs::path& folder, const checkpoint::Checkpoint& from,
                          const codec::CodecRunConfig& config, const std::string& pictures) {
  if (!fs::exists(folder / kConfig)) return detail::concat("it has no ", kConfig, " that says what it trains");
  const auto begun = config::parse<codec::CodecRunConfig>(config::Document::from_file((folder / kConfig).string()));
  if (const auto changes = codec_changes(begun, config); !changes.empty()) return "it must keep " + join(changes, ", ");
  const auto fingerprints = checkpoint::state_from_json(from.state).fingerprints;
  const auto was = fingerprints.find(kPictures);
  return was != fingerprints.end() && was->second == pictures ? "" : "data.train has other pictures than it began with";
}

// What to go on with. Locks the folder, in which everything is then either of that checkpoint or new.
std::optional<checkpoint::Checkpoint> open_folder(const fs::path& folder, const codec::CodecRunConfig& config,
                                                  const std::string& pictures, const std::string& resume,
                                                  bool overwrite, std::optional<run::FolderLock>& lock) {
  // Before anything is made, and again under the lock.
  const auto refuse = [&] {
    const auto saved = checkpoint::list_checkpoints(folder / kCheckpoints);
    MOEGRAFT_CHECK_USAGE(saved.empty() || resume == "auto" || overwrite, folder.string(),
                         " holds a training of this codec, saved at ", saved.back().filename().string(),
                         ": go on with it by --resume auto, begin anew with --overwrite, or name another dir");
  };
  refuse();
  std::error_code error;
  fs::create_directories(folder, error);
  MOEGRAFT_CHECK(!error, "cannot make the folder ", folder.string(), ": ", error.message());
  lock.emplace(lock_folder(folder));
  refuse();
  std::optional<checkpoint::Checkpoint> from;
  if (resume == "auto") {
    if (const auto latest = checkpoint::find_latest(folder / kCheckpoints)) from = checkpoint::load(*latest);
  }
  if (from) {
    const std::string obstacle = find_obstacle(folder, *from, config, pictures);
    MOEGRAFT_CHECK_USAGE(obstacle.empty() || overwrite, "the training in ", folder.string(),
                         " cannot go on: ", obstacle,
                         "; put that back, begin anew with --overwrite, or name another dir");
    if (!obstacle.empty()) {
      log::info("the training in ", folder.string(), " begins anew: ", obstacle);
      from.reset();
    }
  }
  if (!from) {
    fs::remove_all(folder / kCheckpoints, error);
    MOEGRAFT_CHECK(!error, "cannot remove ", (folder / kCheckpoints).string(), ": ", error.message());
  }
  run::LineLog(folder / kMetrics).cut_back(from ? from->step : -1);
  io::write_file_atomic(folder / kConfig, config::dump(config));
  return from;
}

}  // namespace

std::string fingerprint_pictures(const at::Tensor& pixels_u8) {
  const at::Tensor whole = pixels_u8.contiguous();
  return io::checksum_hex({reinterpret_cast<const char*>(whole.const_data_ptr<uint8_t>()), size_t(whole.nbytes())});
}

std::vector<std::string> codec_changes(const codec::CodecRunConfig& before, const codec::CodecRunConfig& after) {
  const auto was = run::flat_config(config::dump(before)), is = run::flat_config(config::dump(after));
  std::vector<std::string> changes;
  const auto compare = [&](const std::string& key) {
    const auto old_value = was.find(key), new_value = is.find(key);
    const std::string a = old_value == was.end() ? "nothing" : old_value->second,
                      b = new_value == is.end() ? "nothing" : new_value->second;
    if (a != b && !is_free(key)) changes.push_back(key + " (was " + a + ", is " + b + ")");
  };
  for (const auto& [key, value] : was) compare(key);
  for (const auto& [key, value] : is)
    if (!was.contains(key)) compare(key);
  return changes;
}

fs::path codec_training_folder(const std::string& dir) {
  fs::path codec = fs::absolute(dir).lexically_normal();
  if (!codec.has_filename()) codec = codec.parent_path();  // "dir/"
  return codec.parent_path() / (codec.filename().string() + ".training");
}

void remove_codec_training(const std::string& dir) {
  const fs::path folder = codec_training_folder(dir);
  if (!fs::exists(folder)) return;
  const run::FolderLock lock = lock_folder(folder);
  remove_folder(folder);
}

struct CodecRun::State {
  codec::CodecRunConfig config;
  fs::path folder;
  int64_t count;         // of pictures
  std::string pictures;  // their fingerprint
  std::optional<run::FolderLock> lock;
  std::optional<checkpoint::Checkpoint> from;
  CodecTrainer trainer;
  checkpoint::CheckpointWriter writer;
  run::LineLog metrics;
  checkpoint::TrainState state;
  Clock::time_point session_start = Clock::now();
  double earlier_seconds = 0, window_start = 0;
  int64_t window_pictures = 0;

  State(const codec::CodecRunConfig& config_in, const at::Tensor& pixels_u8, const std::string& resume, bool overwrite)
      : config(config_in),
        folder(codec_training_folder(config.dir)),
        count(pixels_u8.size(0)),
        pictures(fingerprint_pictures(pixels_u8)),
        from(open_folder(folder, config, pictures, resume, overwrite, lock)),
        trainer(config.codec, config.train, uint64_t(config.seed), pixels_u8),
        writer(folder / kCheckpoints, config.checkpoint),
        metrics(folder / kMetrics) {
    const auto environment = run::describe_environment();
    if (from) {
      trainer.restore(*from);
      state = checkpoint::state_from_json(from->state);
      for (const auto& line : checkpoint::environment_differences(state.environment, environment))
        log::warning(
            "resuming on another environment, so the codec is not bit-identical to an uninterrupted training's: ",
            line);
      writer.set_aside_after(from->step);
      log::info("resuming ", folder.string(), " after step ", state.step);
    }
    state.seed = config.seed;
    state.environment = environment;
    state.fingerprints = {{kPictures, pictures}};
  }

  double seconds() const { return earlier_seconds + seconds_since(session_start); }

  void log_metrics(const CodecTrainer::Report& report) {
    const double now = seconds();
    run::TrainingLine line;
    line.step = state.step, line.tokens = state.tokens_seen, line.epochs = double(state.tokens_seen) / double(count),
    line.seconds = now;
    line.loss = report.loss, line.grad_norm = report.grad_norm, line.lr_factor = report.lr_factor,
    line.psnr = codec::psnr(report.mse);
    line.tokens_per_s = double(window_pictures) / std::max(now - window_start, 1e-9);
    metrics.append(run::to_json_line(line));
    window_pictures = 0, window_start = now;
  }

  void save() {
    state.seconds = seconds();
    metrics.sync();
    writer.save(state.step, trainer.parameters(), trainer.optimizer_state(), checkpoint::to_json(state));
  }
};

CodecRun::CodecRun(const codec::CodecRunConfig& config, const at::Tensor& pixels_u8, const std::string& resume,
                   bool overwrite)
    : state_(std::make_unique<State>(config, pixels_u8, resume, overwrite)) {}

CodecRun::~CodecRun() = default;

CodecOutcome CodecRun::train() {
  State& s = *state_;
  const codec::CodecTrainConfig& t = s.config.train;
  const run::StopSignals signals;
  Progress progress("codec", t.steps);
  progress.start_at(s.state.step);
  progress.update(s.state.step);  // one that had reached its end says so
  s.session_start = Clock::now();
  s.earlier_seconds = s.window_start = s.state.seconds;
  bool saved = true;  // before the first step there is nothing to save
  std::optional<double> smooth_mse;
  while (s.state.step < t.steps) {
    if (signals.requested()) {
      if (!saved) s.save();
      s.writer.wait();
      progress.finish();
      log::warning("stopped by ", run::signal_name(signals.received()), " after step ", s.state.step,
                   "; saved. --resume auto continues.");
      return {nullptr, s.state.step, s.seconds()};
    }
    double done = double(s.state.step) / double(t.steps);
    if (t.max_minutes > 0) {
      const double minutes = s.seconds() / 60;
      if (minutes >= t.max_minutes) break;
      done = std::max(done, minutes / t.max_minutes);
    }
    const auto report = s.trainer.step(s.state.step, done);
    ++s.state.step;
    s.state.tokens_seen += t.batch_size, s.window_pictures += t.batch_size;
    s.state.last_loss = report.loss, s.state.lr_factor = report.lr_factor;
    saved = false;
    smooth_mse = smooth_mse ? 0.98 * *smooth_mse + 0.02 * report.mse : report.mse;
    char status[96];
    std::snprintf(status, sizeof status, "loss %.4f · PSNR %.2f dB%s", report.loss, codec::psnr(*smooth_mse),
                  report.frozen      ? " · decoder only"
                  : report.quantised ? ""
                                     : " · no codebook yet");
    progress.update(s.state.step, status);
    if (s.state.step % t.log_every == 0 || s.state.step == t.steps) s.log_metrics(report);
    if (s.state.step % s.config.checkpoint.every == 0) {
      s.save();
      saved = true;
    }
  }
  if (!saved) s.save();
  s.writer.wait();
  progress.finish();
  const double seconds = s.seconds();
  return {s.trainer.finish(), s.state.step, seconds};
}

const fs::path& CodecRun::folder() const { return state_->folder; }

void CodecRun::remove() { remove_folder(state_->folder); }

}  // namespace moegraft::train
