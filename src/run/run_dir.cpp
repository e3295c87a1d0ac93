#include "moegraft/run/run_dir.h"

#include <unistd.h>

#include <algorithm>
#include <ctime>
#include <thread>
#include <utility>

#include "fields.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/text.h"
#include "moegraft/checkpoint/checkpoint.h"
#include "moegraft/io/files.h"
#include "moegraft/io/json.h"
#include "moegraft/io/staged_folder.h"

#ifndef MOEGRAFT_VERSION
#define MOEGRAFT_VERSION "unknown"
#endif
#ifndef MOEGRAFT_GIT_COMMIT
#define MOEGRAFT_GIT_COMMIT "unknown"
#endif

namespace fs = std::filesystem;

namespace moegraft::run {
namespace {

constexpr const char* kConfig = "config.yaml";
constexpr const char* kRun = "run.json";

std::string now_utc() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text;
}

void flatten(const config::Tree& tree, const std::string& path, std::map<std::string, std::string>& out) {
  using Kind = config::Tree::Kind;
  if (tree.kind == Kind::scalar || tree.kind == Kind::null) {
    out[path] = tree.kind == Kind::null ? "null" : tree.text;
    return;
  }
  if (tree.entries.empty()) out[path] = tree.kind == Kind::list ? "[]" : "{}";
  for (size_t i = 0; i < tree.entries.size(); ++i) {
    const auto& [key, value] = tree.entries[i];
    flatten(value,
            tree.kind == Kind::list ? path + "[" + std::to_string(i) + "]"
            : path.empty()          ? key
                                    : path + "." + key,
            out);
  }
}

bool is_free(const std::string& key) {
  const std::string name = key.substr(0, key.find('['));  // a list is free as a whole
  return std::any_of(keys_free_on_resume().begin(), keys_free_on_resume().end(), [&](const std::string& free) {
    if (free.ends_with(".*")) return name.starts_with(free.substr(0, free.size() - 1));
    return name == free;
  });
}

Session session(int64_t from_step, const std::string& device, const std::vector<ConfigChange>& changes,
                const Fingerprints& was, const Fingerprints& now) {
  Session out;
  out.started = now_utc(), out.host = host_name(), out.pid = getpid(), out.cores = std::thread::hardware_concurrency();
  out.from_step = from_step;
  out.environment = describe_environment(device);
  const auto change = [](const std::string& name, const std::string& before, const std::string& after) {
    return name + ": " + before + " -> " + after;
  };
  for (const auto& c : changes) out.changed.push_back(change(c.key, c.before, c.after));
  std::vector<std::string> accepted;
  for (const auto& [name, before] : was)
    if (const auto after = now.find(name); after != now.end() && after->second != before)
      accepted.push_back(change(name, before, after->second));
  if (!accepted.empty()) out.accepted = accepted;
  return out;
}

// Of what is there no byte changes but those of the edit: an earlier or later version's keys stay.
template <class F>
void edit_run_json(const fs::path& dir, F&& edit) {
  auto j = io::read_json(dir / kRun);
  edit(j);
  io::write_json(dir / kRun, j);
}

}  // namespace

std::map<std::string, std::string> flat_config(const std::string& yaml) {
  std::map<std::string, std::string> out;
  flatten(config::Document::from_string(yaml).root(), "", out);
  return out;
}

std::map<std::string, std::string> flat_config(const RunConfig& config) { return flat_config(config::dump(config)); }

std::string git_commit() { return MOEGRAFT_GIT_COMMIT; }

bool is_run(const fs::path& dir) { return fs::exists(dir / kConfig); }

RunConfig load_run_config(const fs::path& dir) {
  MOEGRAFT_CHECK(is_run(dir), dir.string(), " is not a run directory: it has no ", kConfig);
  return config::parse_stored<RunConfig>(config::Document::from_file((dir / kConfig).string()));
}

const std::vector<std::string>& keys_free_on_resume() {
  static const std::vector<std::string> keys = {"run.dir",
                                                "model.device",
                                                "model.offload",
                                                "model.cpu_path",
                                                "model.attention",
                                                "train.memory_budget_gib",
                                                "train.steps",
                                                "train.max_minutes",
                                                "train.log_every",
                                                "train.eval_every",
                                                "train.eval_tokens",
                                                "train.sample_every",
                                                "train.sample_prompts",
                                                "data.prefetch",
                                                "routing.every",
                                                "checkpoint.*",
                                                "train.accumulation",
                                                "train.strict",
                                                "parallel.*"};
  return keys;
}

std::vector<ConfigChange> compare_configs(const RunConfig& before, const RunConfig& after) {
  const auto old_values = flat_config(before), new_values = flat_config(after);
  std::vector<ConfigChange> changes;
  for (const auto& [key, value] : old_values) {
    const auto now = new_values.find(key);
    if (now == new_values.end() || now->second != value)
      changes.push_back({key, value, now == new_values.end() ? "nothing" : now->second, is_free(key)});
  }
  for (const auto& [key, value] : new_values)
    if (!old_values.contains(key)) changes.push_back({key, "nothing", value, is_free(key)});
  return changes;
}

bool RunDir::has_trained(const fs::path& dir) {
  const auto all = checkpoint::list_checkpoints(dir / "checkpoints");
  return std::any_of(all.begin(), all.end(),
                     [](const fs::path& one) { return one.filename() != checkpoint::step_name(0); });
}

RunDir::RunDir(fs::path dir) : metrics(dir / "metrics.jsonl"), routing(dir / "routing.jsonl"), dir_(std::move(dir)) {
  MOEGRAFT_CHECK_USAGE(!dir_.empty(), "run.dir is required: the directory of the run");
  std::error_code error;
  fs::create_directories(dir_, error);
  MOEGRAFT_CHECK(!error, "cannot make the run directory ", dir_.string(), ": ", error.message());
  lock_.emplace(dir_, "run directory", "wait for it, stop it, or name another run.dir");
  for (const auto& folder : {checkpoints(), samples(), tensorboard()}) {
    fs::create_directories(folder, error);
    MOEGRAFT_CHECK(!error, "cannot make the folder ", folder.string(), ": ", error.message());
  }
}

RunDir RunDir::open_new(const RunConfig& config, bool over_untrained) {
  const fs::path dir = config.run.dir;
  // Before the constructor makes anything, and again under the lock.
  const auto refuse = [&] {
    if (over_untrained ? !has_trained(dir) : checkpoint::list_checkpoints(dir / "checkpoints").empty()) return;
    MOEGRAFT_CHECK_USAGE(is_run(dir), "the directory ", dir.string(), " holds checkpoints but no ", kConfig,
                         " that says what they are of: put it back, or name another run.dir");
    fail<UsageError>("the directory ", dir.string(), " already holds a run: continue it with --resume auto",
                     has_trained(dir) ? "" : " (it has trained no step yet, so a corrected config begins anew there)",
                     ", or name another run.dir");
  };
  refuse();
  RunDir run(dir);
  refuse();
  std::error_code error;
  for (const auto& untrained : checkpoint::list_checkpoints(run.checkpoints())) {
    fs::remove_all(untrained, error);
    MOEGRAFT_CHECK(!error, "cannot remove ", untrained.string(), ", which has trained no step: ", error.message());
  }
  return run;
}

void RunDir::note_trainable(const std::vector<TrainedRow>& rows) {
  edit_run_json(dir_, [&](io::Json& j) { j["trainable"] = fields::to_value(rows); });
}

void RunDir::note_warning(const Warning& warning) {
  edit_run_json(dir_, [&](io::Json& j) { j["warnings"].push_back(fields::to_value(warning)); });
}

void RunDir::begin(const RunConfig& config, const Fingerprints& fingerprints, const Session& session,
                   std::optional<std::string> branched_from) {
  RunRecord record;
  record.moegraft = MOEGRAFT_VERSION, record.git_commit = git_commit(), record.seed = config.run.seed;
  record.fingerprints = fingerprints;
  record.sessions = {session};
  record.branched_from = std::move(branched_from);
  io::write_json(dir_ / kRun, fields::to_value(record));
  io::write_file_atomic(dir_ / kConfig, config::dump(config));  // last: it makes the directory a run
}

RunDir RunDir::create(const RunConfig& config, const Fingerprints& fingerprints, const std::string& device,
                      bool over_untrained) {
  RunDir run = open_new(config, over_untrained);
  run.metrics.cut_back(-1), run.routing.cut_back(-1);  // of a start that saved nothing
  run.begin(config, fingerprints, session(0, device, {}, {}, {}));
  return run;
}

namespace {

// What may not change on resume, and did: "key (was …, is …)". recorded: a thing that is compared by content may lie
// elsewhere.
std::vector<std::string> refused_changes(const std::vector<ConfigChange>& changes, const Fingerprints& recorded,
                                         const Fingerprints& now) {
  std::vector<std::string> refused;
  const auto moved = [&](const ConfigChange& change) {
    return recorded.contains(content_of(change.key)) && now.contains(content_of(change.key));
  };
  for (const auto& change : changes)
    if (!change.allowed && !moved(change))
      refused.push_back(change.key + " (was " + change.before + ", is " + change.after + ")");
  return refused;
}

std::vector<ConfigChange> allowed_changes(const RunConfig& before, const RunConfig& after, const Fingerprints& recorded,
                                          const Fingerprints& now, const std::string& remedy) {
  const auto changes = compare_configs(before, after);
  const auto refused = refused_changes(changes, recorded, now);
  MOEGRAFT_CHECK_USAGE(refused.empty(), "a resumed run must keep ", join(refused, ", "),
                       "; only these keys may change: ", join(keys_free_on_resume(), ", "), ". ", remedy);
  return changes;
}

}  // namespace

bool RunDir::would_resume(const RunConfig& config, const Fingerprints& fingerprints) {
  const fs::path dir = config.run.dir;
  const Fingerprints was = recorded_fingerprints(dir);
  return was == fingerprints &&
         refused_changes(compare_configs(load_run_config(dir), config), was, fingerprints).empty();
}

RunDir RunDir::resume(const RunConfig& config, const Fingerprints& fingerprints, int64_t step,
                      const std::string& device, bool accept_data) {
  const fs::path dir = config.run.dir;
  MOEGRAFT_CHECK(is_run(dir), dir.string(), " holds no run to resume: it has no ", kConfig);
  RunDir run(dir);
  const Fingerprints was = recorded_fingerprints(dir);
  const auto changes =
      allowed_changes(load_run_config(dir), config, was, fingerprints,
                      "Start a new run.dir instead (adapters[].init_from takes over what was learned)");
  check_identity(dir, fingerprints, config, accept_data);
  edit_run_json(dir, [&](io::Json& j) {
    j["sessions"].push_back(fields::to_value(session(step, device, changes, was, fingerprints)));
    j["fingerprints"] = fingerprints;
  });
  if (!changes.empty()) io::write_file_atomic(dir / kConfig, config::dump(config));
  const int64_t keep = step > 0 ? step : -1;  // what was evaluated before the first step is evaluated again
  run.metrics.cut_back(keep);
  run.routing.cut_back(keep);
  return run;
}

RunDir RunDir::branch(const RunConfig& config, const Fingerprints& fingerprints, const fs::path& checkpoint,
                      int64_t step, const std::string& device, bool accept_data) {
  const fs::path source = fs::absolute(checkpoint).lexically_normal().parent_path().parent_path();
  MOEGRAFT_CHECK(is_run(source), checkpoint.string(), " is not in the checkpoints folder of a run");
  const Fingerprints was = recorded_fingerprints(source);
  const auto changes = allowed_changes(load_run_config(source), config, was, fingerprints,
                                       "A branch goes on from its checkpoint with the config of its run");
  check_identity(source, fingerprints, config, accept_data);
  RunDir run = open_new(config);
  for (const char* name : {"vocabulary.json", "init.json"})
    if (fs::exists(source / name)) io::write_file_atomic(run.dir_ / name, io::read_file(source / name));
  run.metrics.cut_back(-1), run.routing.cut_back(-1);
  run.metrics.copy_from(source / "metrics.jsonl", step), run.routing.copy_from(source / "routing.jsonl", step);
  io::StagedFolder copy(run.checkpoints() /
                        checkpoint::step_name(step));  // so that a kill before the next one loses nothing
  for (const auto& file : fs::directory_iterator(checkpoint)) {
    fs::copy_file(file.path(), copy.path() / file.path().filename());
    io::sync_file(copy.path() / file.path().filename());
  }
  copy.publish();
  run.begin(config, fingerprints, session(step, device, changes, was, fingerprints),
            fs::absolute(checkpoint).lexically_normal().string());
  return run;
}

}  // namespace moegraft::run
