#pragma once
// What a run writes down, as types: the lines of metrics.jsonl, and run.json. A key is named once, in the list of
// fields that writing and reading share. A plain field is in every version's records; an optional one came later, or
// not every run has it, and is left out where it is empty. NaN is null in the file.

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace moegraft::routing {
struct RoutingLine;  // routing/stats.h
}

namespace moegraft::run {

// metrics.jsonl, every train.log_every steps. Losses by modality, rates and shares are over the steps since the line
// before.
struct TrainingLine {
  int64_t step = 0;    // steps taken
  int64_t tokens = 0;  // seen so far; of a codec's training: pictures
  double epochs = 0;   // documents drawn so far / documents there are
  double seconds = 0;  // of training so far, over all sessions
  std::optional<int64_t> truncated_documents,
      skipped_documents;  // so far: text cut at data.sequence_length, other documents longer than that
  std::optional<std::vector<double>> busy_seconds_by_rank;  // of a step, without waiting for other processes

  double loss = 0, grad_norm = 0;     // of this step
  double lr_factor = 0;               // its learning rate's share of the peak
  std::map<std::string, double> nll;  // by modality: those with labels
  double tokens_per_s = 0;
  std::optional<double> data_wait_share;         // of the time in steps
  std::optional<double> checkpoint_stall_share;  // of the time since the save before: on the first line after a save
  std::optional<double> prefix_cache_hit_share;  // of the tokens looked up
  std::optional<double> comm_wait_share, comm_mib_per_step;  // with several processes
  std::optional<double> psnr;                                // dB, of this step's pictures: a codec's training

  // What curves are drawn of.
  template <class V>
  void visit_measures(V& v) {
    v("loss", loss);
    v("grad_norm", grad_norm);
    v("lr_factor", lr_factor);
    v.by_name("nll_", nll);
    v("tokens_per_s", tokens_per_s);
    v("data_wait_share", data_wait_share);
    v("checkpoint_stall_share", checkpoint_stall_share);
    v("prefix_cache_hit_share", prefix_cache_hit_share);
    v("comm_wait_share", comm_wait_share);
    v("comm_mib_per_step", comm_mib_per_step);
    v("psnr", psnr);
  }
  template <class V>
  void visit_fields(V& v) {
    v("step", step);
    v("tokens", tokens);
    v("epochs", epochs);
    v("seconds", seconds);
    v("truncated_documents", truncated_documents);
    v("skipped_documents", skipped_documents);
    v("busy_seconds_by_rank", busy_seconds_by_rank);
    visit_measures(v);
  }
  bool operator==(const TrainingLine&) const = default;
};

// metrics.jsonl, after each evaluation of data.eval.
struct EvaluationLine {
  int64_t step = 0;
  bool eval = true;                   // tells the kind of the line
  std::map<std::string, double> nll;  // by modality: those with labels
  template <class V>
  void visit_fields(V& v) {
    v("step", step);
    v("eval", eval);
    v.by_name("eval_nll_", nll);
  }
  bool operator==(const EvaluationLine&) const = default;
};

// One line of JSON, without a line break.
std::string to_json_line(const TrainingLine& line);
std::string to_json_line(const EvaluationLine& line);

// The measures of a line by their keys; of the optional ones those that it has.
std::map<std::string, double> measures(const TrainingLine& line);

// metrics.jsonl, in the order of writing.
struct Metrics {
  std::vector<TrainingLine> training;
  std::vector<EvaluationLine> evaluations;
  // How far the file was read, for read_more.
  int64_t bytes = 0, lines = 0;
  std::string last_line;
};

// Empty where there is no file: it is made with its first line. A last line without its end (the run was killed, or is
// writing) is left out; so are lines of other kinds, and keys that this version does not know. UserError for anything
// else that does not read as it should: "runs/a/metrics.jsonl:7: ...".
Metrics read_metrics(const std::filesystem::path& path);
// Adds what was written since. Begins anew when the file was cut back, as a resume does.
void read_more(const std::filesystem::path& path, Metrics& metrics);

// routing.jsonl, by the same rules.
std::vector<routing::RoutingLine> read_routing(const std::filesystem::path& path);

// What trains, place by place: "adapters[0] gate, rank 16" in "48 layers x 128 experts".
struct TrainedRow {
  std::string what, where;
  int64_t parameters = 0, bytes = 0;  // bytes as float32
  template <class V>
  void visit_fields(V& v) {
    v("what", what);
    v("where", where);
    v("parameters", parameters);
    v("bytes", bytes);
  }
  bool operator==(const TrainedRow&) const = default;
};

std::string to_json(const std::vector<TrainedRow>& rows);

// What a check of the training had to say.
struct Warning {
  int64_t step = 0;
  std::string check, text;
  template <class V>
  void visit_fields(V& v) {
    v("step", step);
    v("check", check);
    v("text", text);
  }
  bool operator==(const Warning&) const = default;
};

// One start of the training.
struct Session {
  std::string started;  // UTC
  std::string host;
  int64_t pid = 0, cores = 0, from_step = 0;
  std::map<std::string, std::string> environment;  // describe_environment
  std::vector<std::string> changed;                // config keys: "train.steps: 100 -> 200"
  std::optional<std::vector<std::string>>
      accepted;  // fingerprints of data that is other data than before, in the same form
  template <class V>
  void visit_fields(V& v) {
    v("started", started);
    v("host", host);
    v("pid", pid);
    v("cores", cores);
    v("from_step", from_step);
    v("environment", environment);
    v("changed", changed);
    v("accepted", accepted);
  }
  bool operator==(const Session&) const = default;
};

// run.json.
struct RunRecord {
  std::string format = "moegraft run";
  int64_t version = 1;
  std::string moegraft, git_commit;  // that began it
  int64_t seed = 0;
  std::vector<Session> sessions;
  std::optional<std::map<std::string, std::string>> fingerprints;  // of what it was made from: identity.h
  std::optional<std::string> branched_from;                        // another run's checkpoint
  std::optional<std::vector<TrainedRow>> trainable;
  std::optional<std::vector<Warning>> warnings;
  template <class V>
  void visit_fields(V& v) {
    v("format", format);
    v("version", version);
    v("moegraft", moegraft);
    v("git_commit", git_commit);
    v("seed", seed);
    v("sessions", sessions);
    v("fingerprints", fingerprints);
    v("branched_from", branched_from);
    v("trainable", trainable);
    v("warnings", warnings);
  }
  bool operator==(const RunRecord&) const = default;
};

// run.json of a run's directory. Keys that this version does not know are passed over. UserError names the file and the
// key.
RunRecord read_run_record(const std::filesystem::path& dir);

}  // namespace moegraft::run
