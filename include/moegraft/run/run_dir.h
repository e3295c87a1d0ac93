#pragma once
// The run directory, the truth about a run:
//   config.yaml (resolved)   run.json (versions, hardware, sessions)   metrics.jsonl   routing.jsonl   tb/   samples/
//   checkpoints/   lock

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "moegraft/run/folder_lock.h"
#include "moegraft/run/identity.h"
#include "moegraft/run/records.h"
#include "moegraft/run/run_config.h"

namespace moegraft::run {

// What bit-identity depends on: binary (checksum of the executable), libtorch, processor, vector instructions, threads,
// device.
std::map<std::string, std::string> describe_environment(const std::string& device = "cpu");

// The commit that this build was configured at; "unknown" outside a checkout.
std::string git_commit();

// True when a run was started there (config.yaml exists).
bool is_run(const std::filesystem::path& dir);

// The resolved config of an existing run, an earlier version's too. UserError when `dir` is none.
RunConfig load_run_config(const std::filesystem::path& dir);

// Keys that may differ when a run continues; a trailing ".*" stands for a whole section. All others decide what is
// computed.
const std::vector<std::string>& keys_free_on_resume();

// Every key of a config and its value: "train.steps" -> "100".
std::map<std::string, std::string> flat_config(const RunConfig& config);
std::map<std::string, std::string> flat_config(const std::string& yaml);  // as config::dump writes it, of any config

// "train.steps: 100 -> 200" for each key that differs.
struct ConfigChange {
  std::string key, before, after;
  bool allowed = false;
};
std::vector<ConfigChange> compare_configs(const RunConfig& before, const RunConfig& after);

// Lines of JSON with a "step" each, appended one write at a time.
class LineLog {
 public:
  LineLog() = default;
  explicit LineLog(std::filesystem::path path);  // opened (and made) on the first append
  ~LineLog();
  LineLog(LineLog&& other) noexcept;
  LineLog& operator=(LineLog&& other) noexcept;

  // `line` is one JSON object without a line break. In the file when this returns. UserError (full disk): no half line
  // stays.
  void append(const std::string& line);
  // Drops lines with a step beyond `step`, and a last line cut short by a kill.
  void cut_back(int64_t step);
  // Copies the lines up to `step` of another log, where it exists.
  void copy_from(const std::filesystem::path& other, int64_t step);
  void sync();

 private:
  void close();
  std::filesystem::path path_;
  int fd_ = -1;
};

// Owns the directory until destroyed: one process at a time, held by a file lock that the system releases when the
// process ends.
class RunDir {
 public:
  // A new run in config.run.dir. What an earlier start left there without a checkpoint is taken over; over_untrained:
  // that of step 0 too. UsageError when a run is there already (the remedy,
  // --resume auto, is named); UserError when another process has it.
  static RunDir create(const RunConfig& config, const Fingerprints& fingerprints, const std::string& device = "cpu",
                       bool over_untrained = false);

  // Whether a checkpoint of a step lies there: that of step 0 holds nothing learned, and a corrected config may take
  // the directory over.
  static bool has_trained(const std::filesystem::path& dir);
  // Whether resume() would go on with the run in config.run.dir, data included.
  static bool would_resume(const RunConfig& config, const Fingerprints& fingerprints);

  // Continues the run in config.run.dir after `step` steps: checks that only free keys changed (UsageError names the
  // others), stores the new config, notes the session in run.json and cuts metrics.jsonl and routing.jsonl back.
  // Fingerprints that changed are refused (identity.h), data's unless accept_data; where they are known, paths of the
  // same content may change.
  static RunDir resume(const RunConfig& config, const Fingerprints& fingerprints, int64_t step,
                       const std::string& device = "cpu", bool accept_data = false);

  // A new run in config.run.dir that goes on from another run's checkpoint: as resume() of that run, with its records
  // up to `step` copied, and the checkpoint.
  static RunDir branch(const RunConfig& config, const Fingerprints& fingerprints,
                       const std::filesystem::path& checkpoint, int64_t step, const std::string& device = "cpu",
                       bool accept_data = false);

  RunDir(RunDir&& other) noexcept = default;
  RunDir& operator=(RunDir&&) = delete;

  const std::filesystem::path& path() const { return dir_; }
  std::filesystem::path checkpoints() const { return dir_ / "checkpoints"; }
  std::filesystem::path samples() const { return dir_ / "samples"; }
  std::filesystem::path tensorboard() const { return dir_ / "tb"; }

  // Into run.json: of this session, and one more of them.
  void note_trainable(const std::vector<TrainedRow>& rows);
  void note_warning(const Warning& warning);

  // Write the lines of a step before its checkpoint: a resume keeps lines up to the checkpoint's step.
  LineLog metrics, routing;

 private:
  explicit RunDir(std::filesystem::path dir);  // makes the folders and takes the lock
  static RunDir open_new(const RunConfig& config, bool over_untrained = false);
  void begin(const RunConfig& config, const Fingerprints& fingerprints, const Session& session,
             std::optional<std::string> branched_from = {});
  std::filesystem::path dir_;
  std::optional<FolderLock> lock_;
};

}  // namespace moegraft::run
