// moegraft bench growth: how a step's time and memory grow with tokens, experts, rank and context. Each point is a
// process of its own, so that the peak of one does not hide the next.
#include <malloc.h>
#include <unistd.h>

#include "libtorch.h"

#include <algorithm>
#include <iostream>
#include <memory>

#include "bench.h"
#include "moegraft/base/check.h"
#include "moegraft/base/log.h"
#include "moegraft/base/text.h"
#include "moegraft/model/weights.h"

namespace moegraft::tools::bench {
namespace {

namespace fs = std::filesystem;

struct GrowthOptions {
  std::string model, dtype = "bfloat16", device = "cpu";
  std::vector<std::string> axes{"tokens", "context", "ranks", "experts"};
  std::vector<int64_t> tokens{512, 1024, 2048, 4096}, contexts{128, 512, 2048}, ranks{4, 16, 64}, experts;
  int64_t batch = 4, seq = 512, rank = 16, steps = 3, threads = 0, matmul = 0;
  bool json = false;
};

struct Point {
  std::string axis;
  int64_t value, batch, seq, rank, experts;  // experts 0: the model as it is
};

// A folder that is removed at the end.
class Scratch {
 public:
  Scratch() : path_(fs::temp_directory_path() / ("moegraft-bench-" + std::to_string(getpid()))) {
    fs::create_directories(path_);
  }
  ~Scratch() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  Scratch(const Scratch&) = delete;
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

std::vector<Point> grid(const GrowthOptions& o, const model::DecoderSpec& spec) {
  std::vector<Point> points;
  for (const auto& axis : o.axes) {
    MOEGRAFT_CHECK_USAGE(axis == "tokens" || axis == "context" || axis == "ranks" || axis == "experts",
                         "--axes: tokens, context, ranks or experts, got ", axis);
    if (axis == "tokens")
      for (const int64_t t : o.tokens) {
        const int64_t seq = std::min(o.seq, t);
        MOEGRAFT_CHECK_USAGE(t >= 2 && t % seq == 0, "--tokens ", t, " is no multiple of --seq ", o.seq);
        points.push_back({axis, t, t / seq, seq, o.rank, 0});
      }
    if (axis == "context")
      for (const int64_t c : o.contexts) {
        MOEGRAFT_CHECK_USAGE(c >= 2, "--contexts must be at least 2, got ", c);
        points.push_back({axis, c, std::max<int64_t>(1, o.batch * o.seq / c), c, o.rank, 0});
      }
    if (axis == "ranks")
      for (const int64_t r : o.ranks) {
        MOEGRAFT_CHECK_USAGE(r >= 1 && r <= 1024, "--ranks must be in [1, 1024], got ", r);
        points.push_back({axis, r, o.batch, o.seq, r, 0});
      }
    if (axis == "experts") {
      const int64_t E = spec.num_experts, K = spec.num_experts_per_tok;
      MOEGRAFT_CHECK_USAGE(E > 0, "--axes experts: the model has no experts");
      const std::vector<int64_t> counts =
          o.experts.empty() ? std::vector<int64_t>{std::max(K, E / 2), E, 2 * E} : o.experts;
      for (const int64_t e : counts) {
        MOEGRAFT_CHECK_USAGE(e >= K, "--experts must be at least the ", K, " that a token takes, got ", e);
        points.push_back({axis, e, o.batch, o.seq, o.rank, e});
      }
    }
  }
  return points;
}

// The model's shape with another number of experts, random weights.
void write_base(const fs::path& dir, model::DecoderSpec spec, int64_t experts) {
  spec.num_experts = experts;
  const double bytes = 4.0 * double(spec.num_parameters());
  const double free = double(fs::space(dir.parent_path()).available);
  MOEGRAFT_CHECK(bytes < free, "a base with ", experts, " experts needs ", bytes / 1e9, " GB in ",
                 dir.parent_path().string(), ", where ", free / 1e9, " GB are free");
  model::save_base(model::init_base(spec, {1.0, 0}), dir, at::kFloat);
  malloc_trim(0);
}

void run(const GrowthOptions& o) {
  MOEGRAFT_CHECK_USAGE(!o.model.empty(), "bench growth: give a model: a Hugging Face directory");
  const model::DecoderSpec spec = model::read_spec(o.model);
  graft::parse_dtype(o.dtype);
  const std::vector<Point> points = grid(o, spec);
  const Scratch scratch;
  Json results = Json::array();
  std::vector<std::vector<std::string>> rows;
  int failed = 0;
  for (const Point& p : points) {
    std::string path = o.model;
    if (p.experts > 0) write_base(path = scratch.path() / "base", spec, p.experts);
    std::vector<std::string> args{"bench", "step", path, "--json", "--dtype", o.dtype, "--device", o.device};
    for (const auto& [key, value] : std::vector<std::pair<std::string, int64_t>>{{"--batch", p.batch},
                                                                                 {"--seq", p.seq},
                                                                                 {"--rank", p.rank},
                                                                                 {"--steps", o.steps},
                                                                                 {"--threads", o.threads},
                                                                                 {"--matmul", o.matmul}})
      args.insert(args.end(), {key, std::to_string(value)});
    log::info("bench growth: ", p.axis, " ", p.value);
    const ChildResult child = run_self(args);
    Json r{{"axis", p.axis}, {"value", p.value}, {"batch", p.batch},
           {"seq", p.seq},   {"rank", p.rank},   {"experts", p.experts > 0 ? p.experts : spec.num_experts}};
    if (child.code != 0) {
      ++failed;
      r["error"] = "exit " + std::to_string(child.code) + ": " + trim(child.err);
      rows.push_back({p.axis + " " + std::to_string(p.value), "failed", "-", "-", "-"});
    } else {
      const Json j = Json::parse(child.out);
      for (const char* key : {"tokens", "tokens_per_s", "best_step_s", "median_step_s", "model_gflops_per_s",
                              "share_of_limit", "matmul_gflops", "trained_parameters"})
        r[key] = j[key];
      r["peak_mib"] = j["device"] == "cpu" ? j["vm_hwm_mib"] : j["peak_mib"];
      rows.push_back({p.axis + " " + std::to_string(p.value), fixed(1e3 * j["best_step_s"].get<double>(), 1),
                      fixed(j["tokens_per_s"].get<double>(), 0), fixed(r["peak_mib"].get<double>(), 0),
                      fixed(100 * j["share_of_limit"].get<double>(), 0)});
    }
    results.push_back(std::move(r));
    if (p.experts > 0) fs::remove_all(scratch.path() / "base");
  }
  if (o.json)
    std::cout << Json{{"tool", "moegraft"},
                      {"dtype", o.dtype},
                      {"device", o.device},
                      {"base", {{"batch", o.batch}, {"seq", o.seq}, {"rank", o.rank}}},
                      {"points", results}}
                     .dump()
              << '\n';
  else
    print_table({"grows", "step ms", "tokens/s", "peak MiB", "% of limit"}, rows);
  for (const auto& r : results)
    if (r.contains("error"))
      log::error(r["axis"].get<std::string>(), " ", r["value"].get<int64_t>(), ": ", r["error"].get<std::string>());
  MOEGRAFT_CHECK(failed == 0, "bench growth: ", failed, " of ", points.size(), " points failed");
}

}  // namespace

void add_growth_command(CLI::App& bench) {
  auto o = std::make_shared<GrowthOptions>();
  CLI::App* cmd =
      bench.add_subcommand("growth", "A step's time and peak memory over tokens, context, ranks and experts");
  cmd->add_option("model", o->model, "Hugging Face directory");
  cmd->add_option("--axes", o->axes, "What grows: tokens, context, ranks, experts")
      ->delimiter(',')
      ->capture_default_str();
  cmd->add_option("--tokens", o->tokens, "Tokens of a step, in sequences of --seq")
      ->delimiter(',')
      ->capture_default_str();
  cmd->add_option("--contexts", o->contexts, "Lengths of a sequence, tokens of a step about equal")
      ->delimiter(',')
      ->capture_default_str();
  cmd->add_option("--ranks", o->ranks, "LoRA ranks")->delimiter(',')->capture_default_str();
  cmd->add_option("--experts", o->experts,
                  "Numbers of experts: the model's shape with random weights (default: half, as they are, twice)")
      ->delimiter(',');
  cmd->add_option("--batch", o->batch, "Sequences, where they do not grow")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  cmd->add_option("--seq", o->seq, "Tokens of a sequence, where they do not grow")
      ->check(CLI::Range(2, 1 << 24))
      ->capture_default_str();
  cmd->add_option("--rank", o->rank, "LoRA rank, where it does not grow")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  cmd->add_option("--steps", o->steps, "Steps of each point; the best counts")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  cmd->add_option("--dtype", o->dtype, "float32 or bfloat16")->capture_default_str();
  cmd->add_option("--device", o->device, "cpu or cuda")->capture_default_str();
  cmd->add_option("--threads", o->threads, "CPU threads; 0: all")->check(CLI::Range(0, 4096));
  cmd->add_option("--matmul", o->matmul, "As for step")->check(CLI::Range(0, 1 << 16));
  cmd->add_flag("--json", o->json, "One JSON object on stdout");
  cmd->footer("Example: moegraft bench growth models/base --axes tokens,ranks --tokens 512,2048 --dtype bfloat16");
  cmd->callback([o] { run(*o); });
}

}  // namespace moegraft::tools::bench
